"""Choose the trackers of a command, and report a stage or a training run to all of them."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from jobs.runs.metrics import read_metrics
from jobs.telemetry.trackers import mlflow_tracker
from jobs.telemetry.trackers.mlflow_tracker import MlflowTracker
from jobs.telemetry.trackers.subject import Images, State, Subject, Tracker
from jobs.telemetry.trackers.tensorboard_tracker import TensorboardTracker
from jobs.telemetry.trackers.wandb_tracker import WandbTracker
from model.config import to_dict
from pipeline import storage
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

Choice = Literal["auto", "none", "wandb", "tensorboard", "mlflow"]
_TRACKERS: dict[str, Callable[[Subject], Tracker]] = {
    "wandb": WandbTracker, "tensorboard": TensorboardTracker, "mlflow": MlflowTracker}


def check_choices(choices: Sequence[str]) -> None:
    """ValueError if the trackers exclude each other, or if a package of one is missing."""
    if "none" in choices and len(set(choices)) > 1:
        raise ValueError(f"--tracker none was given with --tracker {next(name for name in choices if name != 'none')}: "
                         f"expected none alone, or the names of trackers\nhint: leave out --tracker none")
    if "mlflow" in choices:
        mlflow_tracker.check_packages()


def chosen(choices: Sequence[str], *, by_default: bool) -> list[str]:
    """The names of the trackers. Without a choice, and with `auto`, it is wandb if `by_default`.

    WANDB_MODE=disabled turns wandb off.
    """
    names = set(choices)
    if by_default and (not names or "auto" in names):
        names.add("wandb")
    if os.environ.get("WANDB_MODE") == "disabled":
        names.discard("wandb")
    return [name for name in _TRACKERS if name in names]


class Trackers:
    """Several trackers of one subject, as one."""

    def __init__(self, subject: Subject, names: Iterable[str]) -> None:
        self.members = [_TRACKERS[name](subject) for name in names]

    def add(self, record: dict[str, Any], images: Images | None = None, *, hold: bool = False) -> None:
        """Report a record to all trackers."""
        for member in self.members:
            member.add(record, images, hold=hold)

    def saved(self) -> None:
        """A checkpoint has all steps so far."""
        for member in self.members:
            member.saved()

    def replay(self, records: Iterable[tuple[dict[str, Any], Images]]) -> None:
        """Report the records of earlier sessions to the trackers that do not have them."""
        every = list(records) if self.members else []
        for member in self.members:
            member.replay(every)

    def close(self, summary: dict[str, Any] | None = None, state: State = "finished") -> None:
        """End the sessions of all trackers."""
        for member in self.members:
            member.close(summary, state)


def open_run_trackers(job: Any, labels: dict[str, str], step: int) -> Trackers:
    """The trackers of a training run (`jobs.training.Job`) that begins or resumes after `step`."""
    subject = Subject(job.run.root, job.run.folder, labels, to_dict(job.config) | {"database": job.database.label},
                      job.run.lineage(), first_step=step + 1, training=True)
    trackers = Trackers(subject, chosen(job.trackers, by_default=True))
    # The caller has cut both files to the checkpoint that the run resumes from.
    records: list[tuple[dict[str, Any], Images]] = [(line, {}) for line in read_metrics(job.run)]
    records += [(note, {"validation": job.run.validated(note["step"])})
                for note in read_metrics(job.run, "validation.jsonl")]
    trackers.replay(sorted(records, key=lambda pair: pair[0]["step"]))
    return trackers


class StageTrackers:
    """The trackers of a stage. Their sessions begin with the first tally: a sealed stage has none."""

    def __init__(self, stage: Stage, labels: dict[str, str], names: Sequence[str]) -> None:
        self.stage, self.labels, self.names = stage, labels, names
        self.trackers: Trackers | None = None

    def watch(self, tally: Tally) -> None:
        """Report the counts of a tally under the number of recorded items. A resumed stage continues from there."""
        if not self.names:
            return
        if self.trackers is None:
            self.trackers = Trackers(Subject(self.stage.root, self.stage.folder, self.labels, self.stage.section(),
                                             self.stage.inputs(), first_step=tally.done_items), self.names)
        self.trackers.add({"step": tally.done_items,
                           **{key: value for key, value in tally.now.items()
                              if isinstance(value, int | float) and key != "updated"},
                           **{f"left_out/{reason}": count for reason, count in tally.now["skipped"].items()}})

    def sealed(self, manifest: dict[str, Any]) -> None:
        """Report the images of a sealed stage, such as the grid of samples, and its manifest as the summary."""
        if self.trackers:
            images = {file["name"].removesuffix(".png"): storage.join(self.stage.folder, file["name"])
                      for file in manifest["files"] if file["name"].endswith(".png") and "/" not in file["name"]}
            if images:
                self.trackers.add({"step": manifest["totals"]["items"]}, images)
            self.close("finished", manifest["totals"] | {"info": manifest["info"], "content": manifest["content"]})

    def close(self, state: State, summary: dict[str, Any] | None = None) -> None:
        """End the sessions."""
        if self.trackers:
            self.trackers.close(summary, state)
            self.trackers = None


@contextlib.contextmanager
def track_stage(stage: Stage, labels: dict[str, str], choices: Sequence[str]) -> Iterator[StageTrackers]:
    """The trackers of a stage while it runs."""
    check_choices(choices)
    tracked = StageTrackers(stage, labels, chosen(choices, by_default="WANDB_API_KEY" in os.environ))
    try:
        yield tracked
    except (KeyboardInterrupt, GeneratorExit):
        tracked.close("stopped")
        raise
    except BaseException:
        tracked.close("failed")
        raise
    tracked.close("finished")
