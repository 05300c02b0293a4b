"""The only file that imports wandb: runs, stages and artifacts."""

import contextlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.runs.metrics import read_metrics
from jobs.telemetry import output
from model.config import to_dict
from pipeline import storage
from pipeline.stages.documents import check_shape
from pipeline.stages.manifest import code_revision
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)
_STATE = {"id": str, "last_step?": int, "finished?": [str]}


class Tracker:
    """A wandb run of a stage or a training run: online where there is a key, offline otherwise.

    The id is kept in wandb.json in the folder that the tracker is about. A resumed run keeps its id, and a run that
    was emptied gets a new one. A failing tracker never stops what it follows.

    Offline, each session has its own directory, and `wandb sync` joins the directories in the order of their names.
    wandb flushes every few seconds. A killed process loses what it has not flushed. For training the directories in
    `wandb/` together hold each step once, in increasing order, up to the last checkpoint:

    * A step is logged when a checkpoint has it. A killed run repeats the steps after its last checkpoint.
    * When a session has finished, wandb.json gets its name and its last step.
    * The next session moves one that did not finish to `wandb-unfinished/`. It logs the steps again (`replay`), from
      metrics.jsonl and validation.jsonl.

    There is one exception. With an object store, sessions lie on the nodes. If the run resumes on another node, an
    unfinished session stays where it is, and its steps are logged twice with equal values.
    """

    def __init__(self, root: str, folder: str, known: dict[str, str], config: dict[str, Any],
                 inputs: dict[str, Any], *, wanted: bool = True, training: bool = False) -> None:
        self.session: Any = None
        self.online = False
        self.folder, self.training = folder, training
        self.first_step = self.last_step = 0  # steps that this session logs: above the first, up to the last
        self._held: list[Callable[[], None]] = []
        if not wanted:
            return
        try:
            import wandb
            mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            run_id, place = _read_state(folder)["id"], _wandb_folder(root, known)
            self.online = mode != "offline"
            if training and not self.online:
                _set_aside(folder, Path(place))
                self.first_step = _read_state(folder)["last_step"]
            self.session = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rdm"), id=run_id, group=group_name(known),
                name=known["run"] or f"{group_name(known)} {known['stage']}", job_type=known["stage"],
                dir=place,
                config=output.escape_document(config | {key: value for key, value in known.items() if value} | {
                    "lineage": inputs, "code": code_revision()}),
                resume="allow", mode=mode, settings=wandb.Settings(
                    silent=True, console="off", init_timeout=60, x_transaction_log_flush_interval=2.0))
            if self.online:  # offline nothing can be named as used
                for artifact in make_artifacts(inputs):
                    self.session.use_artifact(artifact)
        except Exception as error:
            _log.warning("wandb is not used: %s", error)

    def add(self, record: dict[str, Any], picture: str = "", *, hold: bool = False) -> None:
        """Log a record under its step, and the image at a URL; offline `hold` keeps it until `saved`.

        A step that a finished session has is skipped: after a damaged checkpoint a run repeats older steps.
        """
        def log() -> None:
            values = output.escape_document({key: value for key, value in record.items() if key != "step"})
            if picture and storage.exists(picture):
                import wandb
                values["validation"] = wandb.Image(Image.open(io.BytesIO(storage.read_bytes(picture))))
            self.session.log(values, step=record["step"])
            self.last_step = record["step"]

        if self.session is not None and (record["step"] > self.first_step or not self.training):
            self._held.append(log)
            if self.online or not hold:
                self.saved()

    def saved(self) -> None:
        """What was logged so far will not be done again."""
        held, self._held = self._held, []
        for log_record in held:
            self._try(log_record)

    def replay(self, records: Iterable[tuple[dict[str, Any], str]]) -> None:
        """Log what no finished session has; offline only. `records`: each with the URL of its image, or ""."""
        if not self.online:
            for record, picture in records:
                self.add(record, picture)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End the session."""
        self._try(lambda: self.session.summary.update(output.escape_document(summary or {})))
        self._try(self._finish)
        self.session = None

    def _finish(self) -> None:
        session = Path(self.session.dir).parent
        self.session.finish()
        if self.training and session.exists():  # else another process resumed the run and moved this session
            known = _read_state(self.folder)
            storage.put_json(known | {"last_step": max(known["last_step"], self.last_step),
                                      "finished": [*known["finished"], session.name]}, _state_url(self.folder))

    def _try(self, act: Any) -> None:
        if self.session is not None:
            try:
                act()
            except Exception as error:
                _log.warning("wandb stopped: %s", error)
                self.session = None


def start_run_tracker(job: Any, known: dict[str, str]) -> Tracker:
    """The tracker of a training run (jobs.training.Job)."""
    tracker = Tracker(job.run.root, job.run.folder, known, to_dict(job.config) | {"database": job.database.label},
                      job.run.lineage(), wanted=is_wanted(job.tracker, True), training=True)
    # The caller has cut both files to the checkpoint that the run resumes from.
    records = [(line, "") for line in read_metrics(job.run)]
    records += [(note, job.run.validated(note["step"])) for note in read_metrics(job.run, "validation.jsonl")]
    tracker.replay(sorted(records, key=lambda pair: pair[0]["step"]))
    return tracker


def _set_aside(folder: str, place: Path) -> None:
    """Move the offline sessions of a run that did not finish out of the folder that `wandb sync` reads."""
    known = _read_state(folder)
    for session in sorted((place / "wandb").glob(f"offline-run-*-{known['id']}*")):
        if session.name not in known["finished"]:
            folder_aside = place / "wandb-unfinished"
            folder_aside.mkdir(exist_ok=True)
            session.rename(folder_aside / session.name)
            _log.info("wandb: the session %s is not known to be finished. It is in %s now. This session logs its steps "
                      "again.", session.name, folder_aside)


class StageTracker:
    """A stage that wandb follows; a session begins with the first word of its tally, for a sealed stage has none."""

    def __init__(self, stage: Stage, known: dict[str, str]) -> None:
        self.stage, self.known = stage, known
        self.tracker: Tracker | None = None

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


class _NoTracker:
    def watch(self, tally: Tally) -> None: ...

    def sealed(self, manifest: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def track_stage(stage: Stage, known: dict[str, str], tracker: str) -> Iterator[Any]:
    """Who follows a stage: wandb, or nobody."""
    if not is_wanted(tracker, "WANDB_API_KEY" in os.environ):
        yield _NoTracker()
        return
    followed = StageTracker(stage, known)
    try:
        yield followed
    finally:
        followed.close()


def is_wanted(tracker: str, by_default: bool) -> bool:
    """Whether wandb is asked for: by `--tracker`, and not ruled out by WANDB_MODE=disabled."""
    return os.environ.get("WANDB_MODE") != "disabled" and (tracker == "wandb" or (tracker == "auto" and by_default))


def group_name(known: dict[str, str]) -> str:
    """What the stages of one pipeline have in common: dataset@version, or the run where there is none."""
    return "@".join(filter(None, (known["dataset"], known["version"]))) or known["run"]


def make_artifacts(inputs: dict[str, Any]) -> list[Any]:
    """The inputs of a stage as artifacts of wandb: named by their folders, told apart by their content."""
    import wandb
    artifacts = []
    for name, identity in inputs.items():
        path = identity["path"] or name
        artifacts.append(wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "-", path), type=name,
                                    metadata={"path": path, "content": identity["digest"]}))
        # Without something of its own in it, another content would be taken for the same version.
        with artifacts[-1].new_file("content.json") as file:
            json.dump({"path": path, "content": identity["digest"]}, file)
    return artifacts


def _wandb_folder(root: str, known: dict[str, str]) -> str:
    """Where wandb writes: beside the stages of a version, or in the folder of a run, never where stages are listed."""
    if not storage.is_local(root):
        return str(storage.cache_folder())
    folder = ("runs", known["run"]) if known["run"] else ("datasets" if known["version"] else "pictures",
                                                          known["dataset"], known["version"])
    return str(storage.local_path(root).joinpath(*folder))


def _state_url(folder: str) -> str:
    return storage.join(folder, "wandb.json")


def _read_state(folder: str) -> dict[str, Any]:
    """The content of wandb.json: the id, the last step of the finished sessions, and their names.

    The id is made when there is none. Runs of earlier versions have the id alone: none of their sessions counts as
    finished.
    """
    url = _state_url(folder)
    try:
        known = check_shape(storage.read_json(url), url, _STATE, "remove the file; wandb then shows a new run")
    except FileNotFoundError:
        known = {"id": secrets.token_hex(6)}
        storage.put_json(known, url)
    return {"last_step": 0, "finished": []} | known
