"""wandb: sessions online or offline, and artifacts. The only file that imports wandb."""

import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobs.telemetry import output
from jobs.telemetry.trackers.subject import Images, State, Subject, read_image
from pipeline import storage
from pipeline.stages.documents import check_shape
from pipeline.stages.manifest import code_revision

_log = logging.getLogger(__name__)
_STATE = {"id": str, "last_step?": int, "finished?": [str]}


class WandbTracker:
    """A wandb run of a stage or a training run: online if there is a key, offline otherwise.

    wandb.json in the folder of the subject keeps the id. A resumed run keeps its id, and a run that was emptied gets a
    new one. A failing tracker never stops the stage or the run.

    Offline, each session has its own directory, and `wandb sync` joins the directories in the order of their names.
    wandb flushes every few seconds. A killed process loses what it has not flushed. For training the directories in
    `wandb/` together hold each step once, in increasing order, up to the last checkpoint:

    * A step is logged when a checkpoint has it. A killed run repeats the steps after its last checkpoint.
    * When a session has finished, wandb.json gets its name and its last step.
    * The next session moves an unfinished one to `wandb-unfinished/`. It logs the steps again (`replay`), from
      metrics.jsonl and validation.jsonl.

    There is one exception. With an object store, sessions lie on the nodes. If the run resumes on another node, an
    unfinished session stays where it is, and its steps are logged twice with equal values.
    """

    def __init__(self, subject: Subject) -> None:
        self.session: Any = None
        self.online = False
        self.folder, self.training, self._title = subject.folder, subject.training, subject.title
        self.first_step = self.last_step = 0  # steps that this session logs: above the first, up to the last
        self._held: list[Callable[[], None]] = []
        self._lost, self._failure = 0, ""
        try:
            self._open(subject)
        except Exception as error:
            self._fail(error)

    def _open(self, subject: Subject) -> None:
        import wandb
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run_id, labels = _read_state(self.folder)["id"], subject.labels
        self.online = mode != "offline"
        if self.training and not self.online:
            _set_aside(self.folder, subject.place)
            self.first_step = _read_state(self.folder)["last_step"]
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rdm"), id=run_id, group=subject.group, name=subject.title,
            job_type=labels["stage"], dir=str(subject.place),
            config=output.escape_document(subject.settings | {key: value for key, value in labels.items() if value} | {
                "lineage": subject.inputs, "code": code_revision()}),
            resume="allow", mode=mode, settings=wandb.Settings(
                silent=True, console="off", init_timeout=60, x_transaction_log_flush_interval=2.0,
                x_disable_meta=True))  # it has the command line, which may name a key
        if self.online:  # offline nothing can be named as used
            for artifact in make_artifacts(subject.inputs):
                self.session.use_artifact(artifact)

    def add(self, record: dict[str, Any], images: Images | None = None, *, hold: bool = False) -> None:
        """Log a record under its step, and its images; offline `hold` keeps them until `saved`.

        A step that a finished session has is skipped: after a damaged checkpoint a run repeats older steps.
        """
        def log() -> None:
            values = output.escape_document({key: value for key, value in record.items() if key != "step"})
            for name, url in (images or {}).items():
                if image := read_image(url):
                    import wandb
                    values[name] = wandb.Image(image)
            self.session.log(values, step=record["step"])
            self.last_step = record["step"]

        if self.session is None:
            self._lost += 1
        elif record["step"] > self.first_step or not self.training:
            self._held.append(log)
            if self.online or not hold:
                self.saved()

    def saved(self) -> None:
        """Send the held records: a resumed run will not repeat their steps."""
        held, self._held = self._held, []
        for log_record in held:
            self._try(log_record)

    def replay(self, records: Iterable[tuple[dict[str, Any], Images]]) -> None:
        """Log the records that no finished session has; offline only."""
        if not self.online:
            for record, images in records:
                self.add(record, images)

    def close(self, summary: dict[str, Any] | None = None, state: State = "finished") -> None:
        """End the session. wandb shows a run as finished or failed."""
        self._try(lambda: self.session.summary.update(output.escape_document((summary or {}) | {"state": state})))
        self._try(lambda: self._finish(int(state == "failed")))
        self.session = None
        if self._lost:
            _log.warning("wandb: %d records of %s were not tracked: %s", self._lost, self._title, self._failure)

    def _finish(self, exit_code: int) -> None:
        session = Path(self.session.dir).parent
        self.session.finish(exit_code)
        if self.training and session.exists():  # otherwise another process resumed the run and moved this session
            known = _read_state(self.folder)
            storage.put_json(known | {"last_step": max(known["last_step"], self.last_step),
                                      "finished": [*known["finished"], session.name]}, _state_url(self.folder))

    def _try(self, act: Callable[[], None]) -> None:
        if self.session is None:
            return
        try:
            act()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.session, self._failure = None, storage.redact_credentials(storage.first_line(error))
        _log.warning("wandb does not take records of %s: %s", self._title, self._failure)


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


def make_artifacts(inputs: dict[str, Any]) -> list[Any]:
    """The inputs of a stage as artifacts of wandb. The folder gives the name, the content gives the version."""
    import wandb
    artifacts = []
    for name, identity in inputs.items():
        path = identity["path"] or name
        artifacts.append(wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "-", path), type=name,
                                    metadata={"path": path, "content": identity["digest"]}))
        # wandb compares the files of an artifact, so a file with the digest makes other content another version.
        with artifacts[-1].new_file("content.json") as file:
            json.dump({"path": path, "content": identity["digest"]}, file)
    return artifacts


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
