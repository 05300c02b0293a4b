"""metrics.jsonl of a training run: write and read."""

import json
import logging
from typing import Any

from jobs.runs.run import Run
from pipeline import storage

_log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl of a run, a line per log interval, and validation.jsonl; resumed it forgets what came after."""

    def __init__(self, run: Run, step: int) -> None:
        self.address = storage.join(run.folder, "metrics.jsonl")
        self.notes_address = storage.join(run.folder, "validation.jsonl")
        self.lines = [line for line in read_metrics(run) if line["step"] <= step]
        self.notes = [line for line in read_metrics(run, "validation.jsonl") if line["step"] <= step]
        # Seconds continue where they stopped, so that curves over time have no fold.
        self.seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        self.flush()

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record. A local disk has it immediately, an object store after `flush`."""
        record = record | {"seconds": record["seconds"] + self.seconds}
        self.lines.append(record)
        if storage.is_local(self.address):
            with open(storage.local_path(self.address), "a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def note(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add the record of a validation."""
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


def never_made_a_step(run: Run) -> bool:
    """Whether a planned run has neither a checkpoint nor a line of metrics: nothing is lost if another takes its name.

    False if there is no run of this name, or if it was converted.
    """
    try:
        plan = storage.read_json(storage.join(run.folder, "plan.json"))
    except FileNotFoundError:
        return False
    return (isinstance(plan, dict) and plan.get("stage") == "train" and not run.steps()
            and not read_metrics(run) and not storage.exists(storage.join(run.folder, "manifest.json")))


def read_metrics(run: Run, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The curve of a run so far; a last line cut by a crash is left out."""
    try:
        text = storage.read_bytes(url := storage.join(run.folder, name)).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines, damaged = [], 0
    written = text.splitlines()
    for number, line in enumerate(written, 1):
        try:
            record = json.loads(line)
            record["step"] + 0
            lines.append(record)
        except (ValueError, RecursionError, TypeError, KeyError):
            damaged += number < len(written)
    if damaged:
        _log.warning("%s: %d lines are damaged and left out", url, damaged)
    return lines
