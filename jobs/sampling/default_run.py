"""The run for `sample` if the user names none."""

import logging
import shlex
from collections.abc import Sequence
from itertools import takewhile

from jobs.runs.newest_run import runs_by_age
from jobs.runs.run import Run
from jobs.sampling.mixture import Mixture
from jobs.sampling.queries import NAMED_PROMPTS, prompt_flags
from jobs.telemetry.units import format_count
from jobs.training.export import BUNDLED, BUNDLED_RUN, Import, import_run
from pipeline import storage
from pipeline.embeddings.embed import dataset_encoder

_log = logging.getLogger(__name__)


_SHORT = 10
"""A run is short if the bundled model has so many times its steps."""


def default_run(databases: Sequence[Mixture], prompts: Sequence[str], *, dry_run: bool = False) -> Run | None:
    """The newest finished run with the encoder of the databases, or else the bundled model, which becomes a run.

    The log names newer runs that are not finished. None on a dry run if the bundled model is no run yet. ValueError if
    nothing can sample from the databases, of which there is at least one.
    """
    database = databases[0].members[0]
    encoder = dataset_encoder(database)
    runs = runs_by_age(database.root, encoder)
    finished = next((run for run in runs if run.is_finished()), None)
    run = finished or Run.parse(database.root, BUNDLED_RUN)
    for newer in takewhile(lambda newer: newer != run, runs):
        step, root = newer.latest_step(), storage.redact_credentials(newer.root)
        _log.info("sample: the run %s is at step %d of %d and is not used; to use it: python -m jobs sample %s "
                  "%s --database %s --root %s", newer.name, step, newer.config(step)["steps"], newer.name,
                  prompt_flags(prompts), shlex.quote(databases[0].label), shlex.quote(root))
    if finished is None:
        if Import(run, BUNDLED).kept["encoder"] != encoder:
            raise ValueError(f"no finished run in {run.root} has the encoder of {database.label}, {encoder['model']} "
                             f"({encoder['pretrained']})\n"
                             f"hint: python -m jobs train RUN --dataset {database.name_in_commands} "
                             f"--root {storage.quote(run.root)}")
        if dry_run:
            return None
        import_run(run, BUNDLED)
    about = (", the bundled model, which was trained on emoji" if run.name == BUNDLED_RUN else
             f", the newest one (step {run.latest_step()}); for others: python -m jobs ls")
    if finished and (bundled := next((other for other in runs if other.name == BUNDLED_RUN), run)) != run:
        _name_longer_run(run, bundled, databases[0].label, prompts)
    more = f" and {len(prompts) - NAMED_PROMPTS} more" if len(prompts) > NAMED_PROMPTS else ""
    _log.info("sample: %s%s with the run %s%s", ", ".join(map(repr, prompts[:NAMED_PROMPTS])), more, run.name, about)
    return run


def _name_longer_run(run: Run, bundled: Run, database: str, prompts: Sequence[str]) -> None:
    """Name the bundled model if `run` is short beside it, for the images of a short run are rough."""
    step, most = run.latest_step(), bundled.latest_step()
    if most >= _SHORT * step:
        _log.info("sample: %s has only %s, and %s has %s\nhint: python -m jobs sample %s %s --database %s --root %s",
                  run.name, format_count(step, "step"), bundled.name, format_count(most), bundled.name,
                  prompt_flags(prompts), shlex.quote(database), shlex.quote(storage.redact_credentials(run.root)))
