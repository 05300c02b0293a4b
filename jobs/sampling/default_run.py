"""The run for `sample` if the user names none."""

import logging
from collections.abc import Sequence

from jobs.runs.newest_run import find_newest_run
from jobs.runs.run import Run
from jobs.sampling.mixture import Mixture
from jobs.training.export import BUNDLED, BUNDLED_RUN, Import, import_run
from pipeline.embeddings.embed import dataset_encoder

_log = logging.getLogger(__name__)


def default_run(databases: Sequence[Mixture], prompt: str, *, dry_run: bool = False) -> Run | None:
    """The newest run with the encoder of the databases, or else the bundled model, which becomes a run of the root.

    None on a dry run if the bundled model is no run yet. ValueError if nothing can sample from the databases, of which
    there is at least one.
    """
    database = databases[0].members[0]
    encoder = dataset_encoder(database)
    run = find_newest_run(database.root, encoder)
    if run is None:
        run = Run.parse(database.root, BUNDLED_RUN)
        if Import(run, BUNDLED).kept["encoder"] != encoder:
            raise ValueError(f"no run in {run.root} has the encoder of {database.label}, {encoder['model']} "
                             f"({encoder['pretrained']})\n"
                             f"hint: python -m jobs train RUN --dataset {database.label} --root {run.root}")
        if dry_run:
            return None
        import_run(run, BUNDLED)
    about = ", the bundled model, which was trained on emoji" if run.name == BUNDLED_RUN else ""
    _log.info("sample: %r with the run %s%s", prompt, run.name, about)
    return run
