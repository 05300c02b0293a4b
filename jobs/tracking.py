"""The curve of a run: metrics.jsonl always, and the one door to wandb."""

import contextlib
import json
import logging
import os
from typing import Any

from jobs.runs import Run
from pipeline import storage

_log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl of a run, a line per log interval; resumed at a step it forgets what came after."""

    def __init__(self, run: Run, step: int) -> None:
        self.address = storage.join(run.folder, "metrics.jsonl")
        self.lines = [line for line in read(run) if line["step"] <= step]
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

    def flush(self) -> None:
        """Write the whole curve; objects cannot be appended to."""
        storage.put_bytes("".join(json.dumps(line) + "\n" for line in self.lines).encode(), self.address)


def read(run: Run) -> list[dict[str, Any]]:
    """The curve of a run so far; a last line cut by a crash is left out."""
    try:
        text = storage.read_bytes(storage.join(run.folder, "metrics.jsonl")).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Tracker:
    """A wandb run: online where there is a key, offline otherwise, none with WANDB_MODE=disabled.

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
                project=os.environ.get("WANDB_PROJECT", "rdm"), id=storage.short_hash(run.folder), name=run.name,
                dir=str(folder), config=config, resume="allow",
                mode=os.environ.get("WANDB_MODE") or ("online" if with_key else "offline"),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60))
        except Exception as error:
            _log.warning("wandb is not used: %s", error)

    def add(self, record: dict[str, Any]) -> None:
        """Log a record under its step."""
        self._try(lambda: self.session.log({key: value for key, value in record.items() if key != "step"},
                                           step=record["step"]))

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
