"""The labels of a stage folder in metrics, logs and trackers: its dataset, version, stage and run."""

from pipeline import storage

NAMES = ("dataset", "version", "stage", "run")


def stage_labels(path: str, stage: str) -> dict[str, str]:
    """The labels of the folder `path` below a root, which the stage named `stage` writes; "" where it has none."""
    match path.split("/"):
        case ["datasets", name, version, _, *rest]:  # neighbors have a stage for each database
            return _all(name, version, "/".join([stage, *rest]), "")
        case ["runs", run, *_]:
            return _all("", "", stage, run)
        case [*_, name]:
            return _all(name, "", stage, "")
    raise AssertionError(path)


def run_labels(dataset: str, version: str, run: str) -> dict[str, str]:
    """The labels of a training run on a dataset."""
    return _all(dataset, version, "train", run)


def _all(*values: str) -> dict[str, str]:
    # Names of folders may be those of others. Dashboards, logs and wandb show them.
    return dict(zip(NAMES, map(storage.escape_controls, values), strict=True))
