"""The curve of a run: metrics.jsonl always, and the one door to wandb."""

import contextlib
import io
import json
import logging
import os
import secrets
from typing import Any

from PIL import Image

from jobs.runs import Run
from pipeline import storage

_log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl of a run, a line per log interval, and validation.jsonl; resumed it forgets what came after."""

    def __init__(self, run: Run, step: int) -> None:
        self.address = storage.join(run.folder, "metrics.jsonl")
        self.notes_address = storage.join(run.folder, "validation.jsonl")
        self.lines = [line for line in read(run) if line["step"] <= step]
        self.notes = [line for line in read(run, "validation.jsonl") if line["step"] <= step]
        # Seconds go on where they stopped, so that the curve over time has no fold.
        self.seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        self.flush()

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record, on a local disk at once; `flush` does it on an object store."""
        record = record | {"seconds": record["seconds"] + self.seconds}
        self.lines.append(record)
        if storage.is_local(self.address):
            with open(storage.local_path(self.address), "a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def note(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keep what a validation found."""
        self.notes.append(record)
        self._write(self.notes, self.notes_address)
        return record

    def flush(self) -> None:
        """Write the whole curve; objects cannot be appended to."""
        self._write(self.lines, self.address)
        if self.notes:
            self._write(self.notes, self.notes_address)

    @staticmethod
    def _write(lines: list[dict[str, Any]], address: str) -> None:
        storage.put_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), address)


def read(run: Run, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The curve of a run so far; a last line cut by a crash is left out."""
    try:
        text = storage.read_bytes(storage.join(run.folder, name)).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Tracker:
    """A wandb run: online where there is a key, offline otherwise, none with WANDB_MODE=disabled.

    The id lies in the folder of the run, so a resumed run goes on under it, and one that was begun anew does not.
    Offline, a resumed run is a second directory: `wandb sync` joins them by the id, so every
    record carries its step. A failing tracker never stops a training run.
    """

    def __init__(self, run: Run, config: dict[str, Any]) -> None:
        self.session: Any = None
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            import wandb
            folder = storage.local_path(run.folder) if storage.is_local(run.folder) else storage.cache_folder()
            with_key = bool(os.environ.get("WANDB_API_KEY"))
            self.session = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rdm"), id=_id(run), name=run.name,
                dir=str(folder), config=config, resume="allow",
                mode=os.environ.get("WANDB_MODE") or ("online" if with_key else "offline"),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60))
        except Exception as error:
            _log.warning("wandb is not used: %s", error)

    def add(self, record: dict[str, Any], picture: str = "") -> None:
        """Log a record under its step, and the picture at an address if there is one."""
        def log() -> None:
            values = {key: value for key, value in record.items() if key != "step"}
            if picture and storage.exists(picture):
                import wandb
                values["validation"] = wandb.Image(Image.open(io.BytesIO(storage.read_bytes(picture))))
            self.session.log(values, step=record["step"])

        self._try(log)

    def close(self) -> None:
        """End the session."""
        self._try(lambda: self.session.finish())
        self.session = None

    def _try(self, act: Any) -> None:
        if self.session is not None:
            try:
                act()
            except Exception as error:
                _log.warning("wandb stopped: %s", error)
                self.session = None


def _id(run: Run) -> str:
    """The id of a run among wandb's, made when it begins."""
    address = storage.join(run.folder, "wandb.json")
    try:
        return storage.read_json(address)["id"]
    except FileNotFoundError:
        made = secrets.token_hex(6)
        storage.put_json({"id": made}, address)
        return made
