"""How far a run has come, for people and for budgets: what is recorded, and what workers have in hand.

A worker says every few seconds how far it is in its item, in `progress/<item>.json`; the driver adds that to
the records, and keeps the sum in `progress.json` for whoever asks from another terminal. Both are gone when the
stage is sealed, and nothing depends on them but the failure budget.
"""

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from pipeline import storage

LEAST = 200  # rows before a share of failures means anything


def period(folder: str) -> float:
    """Seconds between two words on progress: requests to an object store cost money."""
    return 5.0 if storage.is_local(folder) else 20.0


class Beat:
    """A worker's word on the item in its hands."""

    def __init__(self, folder: str, item: str, heard: Callable[[], None] | None = None) -> None:
        self._url = storage.join(folder, "progress", f"{item}.json")
        self._period, self._last, self._heard = period(folder), time.monotonic(), heard
        self._written = False

    def __call__(self, *, rows: int, samples: int, length: int, skipped: Counter[str]) -> None:
        """Say how many rows are done, if the last word is old enough."""
        if time.monotonic() - self._last < self._period:
            return
        self._last = time.monotonic()
        storage.put_json({"rows": rows, "samples": samples, "bytes": length, "skipped": dict(skipped)}, self._url)
        self._written = True
        if self._heard:
            self._heard()

    def done(self) -> None:
        """The item is recorded, or given up."""
        if self._written:
            storage.remove(self._url)


class Tally:
    """Rows, samples, bytes and reasons so far; the driver's."""

    def __init__(self, folder: str, items: int, rows: int, by_choice: Iterable[str] = ()) -> None:
        self.folder, self.items, self.rows = folder, items, rows
        self.by_choice = set(by_choice)
        self.recorded_ids: set[str] = set()
        self.done_items = self.failed_items = self.retried = 0
        self.recorded = {"rows": 0, "samples": 0, "bytes": 0}
        self.reasons: Counter[str] = Counter()
        self.now: dict[str, Any] = {}
        self._begun = self._last = time.monotonic()
        self._before: int | None = None
        self._in_hand: dict[str, dict[str, Any]] = {}

    def record(self, record: dict[str, Any], length: int) -> None:
        """Count a record; `length`: bytes of its files."""
        self.done_items += 1
        self.recorded_ids.add(record["id"])
        self.recorded["rows"] += record["info"].get("rows", record["samples"] + sum(record["skipped"].values()))
        self.recorded["samples"] += record["samples"]
        self.recorded["bytes"] += length
        self.retried += record["info"].get("retried", 0)
        self.reasons.update(record["skipped"])

    def start(self) -> None:
        """What is counted so far was done by earlier runs."""
        self._before = self.recorded["rows"]

    def due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() - self._last >= period(self.folder)

    def look(self, *, quick: bool = False) -> dict[str, Any]:
        """Count everything anew, tell other terminals, and return it."""
        self._last = time.monotonic()
        if not quick:
            self._in_hand = dict(_read(self.folder))
        # A worker that died leaves its word behind; what is recorded counts as that.
        in_hand = [one for item, one in self._in_hand.items() if item not in self.recorded_ids]
        total = {key: value + sum(one[key] for one in in_hand) for key, value in self.recorded.items()}
        reasons = self.reasons + sum((Counter(one["skipped"]) for one in in_hand), Counter())
        elapsed = self._last - self._begun
        rate = (total["rows"] - (self._before or 0)) / elapsed if elapsed > 0 else 0.0
        left = max(self.rows - total["rows"], 0)
        self.now = total | {
            "of_rows": self.rows, "items": self.done_items, "of_items": self.items, "failed_items": self.failed_items,
            "skipped": dict(reasons.most_common()), "rows_per_s": round(rate, 1), "retried": self.retried,
            "seconds_left": round(left / rate) if rate > 0 and self.rows else None,
            "updated": round(time.time(), 1), "host": platform.node()}
        if not quick:
            storage.put_json(self.now, storage.join(self.folder, "progress.json"))
        return self.now

    def over(self, most: float, *, final: bool = False) -> str:
        """A sentence if the share of rows that failed is above `most`, "" if not or not yet known."""
        now = self.now if not final else self.look(quick=True)
        reasons = {reason: count for reason, count in now["skipped"].items() if reason not in self.by_choice}
        rows, failed = now["rows"] - self.retried, sum(reasons.values()) - self.retried
        if failed <= most * rows or (rows < LEAST and not final):
            return ""
        frequent = ", ".join(f"{count} {reason}" for reason, count in list(reasons.items())[:5])
        return f"{failed} of {rows} rows failed ({failed / rows:.0%}, allowed are {most:.0%}): {frequent}"

    def clear(self) -> None:
        """Remove what was said along the way."""
        if storage.exists(storage.join(self.folder, "progress.json")):
            storage.remove(storage.join(self.folder, "progress.json"))
            storage.remove_tree(storage.join(self.folder, "progress"))


def _read(folder: str) -> Iterable[tuple[str, dict[str, Any]]]:
    base = storage.join(folder, "progress")
    for name in storage.names(base):
        try:
            yield name.removesuffix(".json"), storage.read_json(storage.join(base, name))
        except (FileNotFoundError, ValueError):
            continue  # recorded in this moment
