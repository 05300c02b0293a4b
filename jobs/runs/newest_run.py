"""The run that a command takes if the user names none."""

from typing import Any

from jobs.runs.run import Run
from pipeline import storage

DEMO_RUN = "demo"
"""The run that the demo trains for a minute. Every other run is preferred."""


def find_newest_run(root: str, encoder: dict[str, Any] | None = None) -> Run | None:
    """The finished run with the newest checkpoint, of all or of those with this encoder. None if there is none."""
    return next((run for run in runs_by_age(root, encoder) if run.is_finished()), None)


def runs_by_age(root: str, encoder: dict[str, Any] | None = None) -> list[Run]:
    """The runs with a checkpoint, of all or of those with this encoder: the newest first, the demo's last."""
    root = storage.normalize(root)
    dated = []
    for name in storage.list_folders(storage.join(root, "runs")):
        run = Run(root, name)
        if not run.planned() or not (steps := run.steps()) or (encoder and run.encoder() != encoder):
            continue
        checkpoint = storage.join(run.folder, "checkpoints", f"{steps[-1]:07d}", "manifest.json")
        dated.append((name != DEMO_RUN, storage.modified_time(checkpoint), name))
    return [Run(root, name) for _, _, name in sorted(dated, reverse=True)]
