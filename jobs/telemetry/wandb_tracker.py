"""The only file that imports wandb: runs, stages and artifacts."""

import contextlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.runs.metrics import read
from jobs.telemetry import wandb_offline
from model.config import to_dict
from pipeline import storage
from pipeline.stages.manifest import code_revision
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


class Tracker:
    """A wandb run of a stage or a training run: online where there is a key, offline otherwise.

    Its id lies in the folder that it is about, so what is resumed goes on under it, and what was begun anew does not.
    Offline, that is another directory, and `wandb sync` joins them in the order of their names: so every record
    carries its step, and those of training wait until a checkpoint has their step, for a run that was killed will do
    the steps after it again. What wandb had not yet written down when it was killed is told by the next session, so
    the sessions together are one curve. A failing tracker never stops what it follows.
    """

    def __init__(self, root: str, folder: str, known: dict[str, str], config: dict[str, Any],
                 inputs: dict[str, Any], *, wanted: bool = True) -> None:
        self.session: Any = None
        self.online = False
        self.behind: int | None = None  # the last step of the sessions before, where some are here
        self._held: list[Callable[[], None]] = []
        if not wanted:
            return
        try:
            import wandb
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            id_, place = _id(folder), _place(root, known)
            self.online = mode != "offline"
            if not self.online:
                self.behind = wandb_offline.last_step(Path(place) / "wandb", id_)
            self.session = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rdm"), id=id_, group=group(known),
                name=known["run"] or f"{group(known)} {known['stage']}", job_type=known["stage"],
                dir=place,
                config=config | {key: value for key, value in known.items() if value} | {
                    "lineage": inputs, "code": code_revision()},
                resume="allow", mode=mode, settings=wandb.Settings(
                    silent=True, console="off", init_timeout=60, x_transaction_log_flush_interval=2.0))
            if self.online:  # offline nothing can be named as used
                for one in artifacts(inputs):
                    self.session.use_artifact(one)
        except Exception as error:
            _log.warning("wandb is not used: %s", error)

    def add(self, record: dict[str, Any], picture: str = "", *, hold: bool = False) -> None:
        """Log a record under its step, and the picture at an address; offline `hold` keeps it until `saved`."""
        def log() -> None:
            values = {key: value for key, value in record.items() if key != "step"}
            if picture and storage.exists(picture):
                import wandb
                values["validation"] = wandb.Image(Image.open(io.BytesIO(storage.read_bytes(picture))))
            self.session.log(values, step=record["step"])

        if self.session is not None:
            self._held.append(log)
            if self.online or not hold:
                self.saved()

    def saved(self) -> None:
        """What was logged so far will not be done again."""
        held, self._held = self._held, []
        for one in held:
            self._try(one)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End the session."""
        self._try(lambda: self.session.summary.update(summary or {}))
        self._try(lambda: self.session.finish())
        self.session = None

    def _try(self, act: Any) -> None:
        if self.session is not None:
            try:
                act()
            except Exception as error:
                _log.warning("wandb stopped: %s", error)
                self.session = None


def tracker_of_run(job: Any, known: dict[str, str]) -> Tracker:
    """The tracker of a training run (jobs.training.Job)."""
    tracker = Tracker(job.run.root, job.run.folder, known, to_dict(job.config) | {"database": job.database.label},
                      job.run.lineage(), wanted=wanted(job.tracker, True))
    if tracker.behind is not None:
        for line in read(job.run):  # the curve has been cut to the checkpoint that the run goes on from
            if line["step"] > tracker.behind:
                tracker.add(line)
    return tracker


class Followed:
    """A stage that wandb follows; a session begins with the first word of its tally, for a sealed stage has none."""

    def __init__(self, stage_: Stage, known: dict[str, str]) -> None:
        self.stage, self.known, self.tracker = stage_, known, None

    def watch(self, tally: Tally) -> None:
        """Log how far it is, under the number of recorded items: it goes on where it stopped."""
        self.tracker = self.tracker or Tracker(self.stage.root, self.stage.folder, self.known, self.stage.section(),
                                               self.stage.inputs())
        self.tracker.add({"step": tally.done_items, **{key: value for key, value in tally.now.items()
                                                       if isinstance(value, int | float) and key != "updated"},
                          **{f"left_out/{reason}": count for reason, count in tally.now["skipped"].items()}})

    def sealed(self, manifest: dict[str, Any]) -> None:
        """Keep what the manifest says as the summary."""
        self.close(manifest["totals"] | {"info": manifest["info"], "content": manifest["content"]})

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End the session."""
        if self.tracker:
            self.tracker.close(summary)
            self.tracker = None


class _Nobody:
    def watch(self, tally: Tally) -> None: ...

    def sealed(self, manifest: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def tracker_of_stage(stage_: Stage, known: dict[str, str], tracker: str) -> Iterator[Any]:
    """Who follows a stage: wandb, or nobody."""
    if not wanted(tracker, "WANDB_API_KEY" in os.environ):
        yield _Nobody()
        return
    followed = Followed(stage_, known)
    try:
        yield followed
    finally:
        followed.close()


def wanted(tracker: str, by_default: bool) -> bool:
    """Whether wandb is asked for: by `--tracker`, and not ruled out by WANDB_MODE=disabled."""
    return os.environ.get("WANDB_MODE") != "disabled" and (tracker == "wandb" or (tracker == "auto" and by_default))


def group(known: dict[str, str]) -> str:
    """What the stages of one pipeline have in common: dataset@version, or the run where there is none."""
    return "@".join(filter(None, (known["dataset"], known["version"]))) or known["run"]


def artifacts(inputs: dict[str, Any]) -> list[Any]:
    """The inputs of a stage as artifacts of wandb: named by their folders, told apart by their content."""
    import wandb
    found = []
    for name, one in inputs.items():
        path = one["path"] or name
        found.append(wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "-", path), type=name,
                                    metadata={"path": path, "content": one["digest"]}))
        # Without something of its own in it, another content would be taken for the same version.
        with found[-1].new_file("content.json") as file:
            json.dump({"path": path, "content": one["digest"]}, file)
    return found


def _place(root: str, known: dict[str, str]) -> str:
    """Where wandb writes: beside the stages of a version, or in the folder of a run, never where stages are listed."""
    if not storage.is_local(root):
        return str(storage.cache_folder())
    folder = ("runs", known["run"]) if known["run"] else ("datasets" if known["version"] else "pictures",
                                                          known["dataset"], known["version"])
    return str(storage.local_path(root).joinpath(*folder))


def _id(folder: str) -> str:
    """The id of a folder's run among wandb's, made when it begins."""
    address = storage.join(folder, "wandb.json")
    try:
        return storage.read_json(address)["id"]
    except FileNotFoundError:
        made = secrets.token_hex(6)
        storage.put_json({"id": made}, address)
        return made
