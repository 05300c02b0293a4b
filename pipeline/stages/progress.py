"""The progress of a run, for people and for the failure budget.

A worker reports every few seconds how far it is in its item, in `progress/<item>.json`. The driver adds the
reports to the records and writes the sum to `progress.json`, which other terminals read. The seal removes both.
Only the failure budget depends on them.
"""

import contextlib
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.documents import check_progress, check_report
from pipeline.stages.types import EMPTY_ROW_REASONS, count_row_failures

LEAST = 200  # rows before a share of failures means anything


def period(folder: str) -> float:
    """Seconds between two reports of a worker. Requests to an object store cost money."""
    return 5.0 if storage.is_local(folder) else 20.0


class ProgressReporter:
    """Reports how far a worker is in its item. `again`: the rows of the item failed before."""

    def __init__(self, folder: str, item: str, on_report: Callable[[], None] | None = None, *,
                 again: bool = False) -> None:
        self._url = storage.join(folder, "progress", f"{item}.json")
        self._period, self._last, self._on_report = period(folder), time.monotonic(), on_report
        self._again, self._written = again, False

    def __call__(self, *, rows: int, samples: int, length: int, skipped: Counter[str]) -> None:
        """Report how many rows are done, if the last report is old enough."""
        if time.monotonic() - self._last < self._period:
            return
        self._last = time.monotonic()
        with contextlib.suppress(OSError):  # an item must not fail because a report cannot be written
            storage.put_json({"rows": rows, "samples": samples, "bytes": length, "skipped": dict(skipped),
                              "again": self._again}, self._url)
            self._written = True
        if self._on_report:
            self._on_report()

    def done(self) -> None:
        """The item is recorded, or given up."""
        if self._written:
            with contextlib.suppress(OSError):
                storage.remove(self._url)


class Tally:
    """Rows, samples, bytes and reasons so far, as the driver counts them.

    Retried rows count again in `rows`. Reasons and shares of failures count each row once.
    """

    def __init__(self, folder: str, items: int, rows: int, by_choice: Iterable[str] = (),
                 recorded: set[str] | None = None) -> None:
        """`recorded`: a set that the caller keeps of the ids that have a record."""
        self.folder, self.items, self.rows = folder, items, rows
        self.by_choice = set(by_choice)
        self.recorded_ids: set[str] = set() if recorded is None else recorded
        self.done_items = self.failed_items = self.retried = 0
        self.empty = 0
        """Rows that are kept, and are not good."""
        self.recorded = {"rows": 0, "samples": 0, "bytes": 0}
        self.reasons: Counter[str] = Counter()
        self.devices: Counter[str] = Counter()
        self.now: dict[str, Any] = {}
        self._begun = self._last = self._counted = time.monotonic()
        self._took = 0.0
        self._first: tuple[float, int] | None = None  # when this run had its first rows, and how many
        self.earlier: dict[str, Any] = self.recorded | {"skipped": {}}  # what runs before this one had done
        self._fresh_rows, self._fresh_reasons = 0, Counter[str]()  # of this run, without what is tried again
        self._given_up: set[str] = set()
        self._in_hand: dict[str, dict[str, Any]] = {}
        self.retired: list[dict[str, Any]] = _read_retired(folder)
        """Workers that were retired, also by earlier runs of this stage."""
        # Reports of workers that died with an earlier run. A living worker writes another one soon.
        self._old = dict(_read_reports(folder))

    def record(self, record: dict[str, Any], length: int) -> None:
        """Count a record; `length`: bytes of its files."""
        self.done_items += 1
        self.recorded_ids.add(record["id"])
        rows = record["info"].get("rows", record["samples"] + sum(record["skipped"].values()))
        self.recorded["rows"] += rows
        self.recorded["samples"] += record["samples"]
        self.recorded["bytes"] += length
        self.reasons.update(record["skipped"])
        self._count_empty(record.get("noted", {}))
        self.devices.update(filter(None, [record.get("run", {}).get("device")]))
        if retried := record["info"].get("retried", 0):
            self.retried += retried
        else:
            self._fresh_rows += rows
            self._fresh_reasons.update(record["skipped"])

    def give_up(self, item: str) -> None:
        """Count an item that failed."""
        self.failed_items += 1
        self._given_up.add(item)

    def retire(self, worker: dict[str, Any]) -> None:
        """Note a worker that was retired (`stage.Retired`)."""
        self.retired.append(worker)

    def start(self, done: Sequence[dict[str, Any]] = ()) -> None:
        """Count the records of earlier runs."""
        infos = list(records.infos(done)) if isinstance(done, records.Rows) else []
        if isinstance(done, records.Rows) and infos and all("rows" in info for info, _ in infos):
            counts = records.totals(done)
            self.done_items += counts["items"]
            self.recorded_ids.update(done.ids())
            self.recorded["rows"] += sum(info["rows"] * count for info, count in infos)
            self.recorded["samples"] += counts["samples"]
            self.recorded["bytes"] += counts["bytes"]
            self.retried += sum(info.get("retried", 0) * count for info, count in infos)
            self.reasons.update(counts["skipped"])
            self._count_empty(counts["noted"])
            self.devices.update(records.devices(done))
        else:
            for record in done:
                self.record(record, sum(file["bytes"] for file in record["files"]))
        self.earlier = self.recorded | {"skipped": dict(self.reasons)}
        self._fresh_rows, self._fresh_reasons = 0, Counter()

    def due(self, *, quick: bool = False) -> bool:
        """Whether it is time to count again. Reading the reports of thousands of workers takes a while."""
        if quick:
            return time.monotonic() - self._counted >= 0.5
        return time.monotonic() - self._last >= max(period(self.folder), 10 * self._took)

    def look(self, *, quick: bool = False) -> dict[str, Any]:
        """Count everything again, write it for other terminals, and return it."""
        begun = self._counted = time.monotonic()
        if not quick:
            self._last = begun
            # A worker removes its report when it has written the record, which the driver may read later.
            self._in_hand |= {item: report for item, report in _read_reports(self.folder)
                              if report != self._old.get(item)}
            self._in_hand = {item: report for item, report in self._in_hand.items() if item not in self.recorded_ids}
        in_hand = self._reports()
        total = {key: value + sum(report[key] for report in in_hand) for key, value in self.recorded.items()}
        rate, is_steady = self._rate(begun, total["rows"] - self.earlier["rows"])
        rows_left = max(self.rows - total["rows"], 0)
        self.now = total | {
            "of_rows": self.rows, "items": self.done_items, "of_items": self.items, "failed_items": self.failed_items,
            # Rows that are retried are among the reasons of their first try, until their record replaces them.
            "skipped": dict((+_sum_reasons(self.reasons, [report for report in in_hand if not report["again"]])
                             ).most_common()), "rows_per_s": round(rate, 1),
            "empty": self.empty, "retried": self.retried + sum(report["rows"] for report in in_hand if report["again"]),
            "seconds_left": round(rows_left / rate) if is_steady and rate > 0 and self.rows else None,
            "retired": self.retired, "devices": dict(self.devices), "updated": round(time.time(), 1),
            "host": platform.node()}
        if not quick:
            with contextlib.suppress(OSError):
                storage.put_json(self.now, storage.join(self.folder, "progress.json"))
            self._took = time.monotonic() - begun
        return self.now

    def _rate(self, now: float, rows: int) -> tuple[float, bool]:
        """Rows per second of this run, and whether the rate is good for an estimate of the time left.

        Imports and the start of workers come before the first rows. The rate is good once the time since then is as
        long as the time before, and it leaves that time out.
        """
        if rows and self._first is None:
            self._first = now, rows
        if self._first is not None and now - self._first[0] >= max(self._first[0] - self._begun, 1.0):
            return (rows - self._first[1]) / (now - self._first[0]), True
        elapsed = now - self._begun
        return (rows / elapsed if elapsed > 0 else 0.0), False

    def _count_empty(self, noted: dict[str, int]) -> None:
        self.empty += sum(count for reason, count in noted.items() if reason in EMPTY_ROW_REASONS)

    def over(self, most: float, *, final: bool = False) -> str:
        """A sentence if the share of rows that failed is above `most`, "" if not or not yet known.

        Only rows of this run count, so that a stopped run can continue when the cause is gone. At the end
        (`final`) all rows count.
        """
        fresh = [report for report in self._reports() if not report["again"]]
        rows, reasons = ((self.recorded["rows"] - self.retried, self.reasons) if final else
                         (self._fresh_rows, self._fresh_reasons))
        rows += sum(report["rows"] for report in fresh)
        reasons = Counter({reason: count for reason, count in _sum_reasons(reasons, fresh).items()
                           if reason not in self.by_choice and count > 0})
        failed = reasons.total()
        rows += failed - count_row_failures(reasons)  # a damaged part of a tar is one failure more
        if failed <= most * rows or (rows < LEAST and not final):
            return ""
        frequent = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
        return (f"{failed} of {rows} rows failed ({failed / rows:.0%}, allowed are {most:.0%}): {frequent}"
                f"{' (retried rows count again)' if final and self.retried else ''}")

    def _reports(self) -> list[dict[str, Any]]:
        """Reports on items that are neither recorded nor failed."""
        return [report for item, report in self._in_hand.items()
                if item not in self.recorded_ids and item not in self._given_up]

    def clear(self) -> None:
        """Remove the reports and their sum."""
        storage.remove(storage.join(self.folder, "progress.json"))
        storage.remove_tree(storage.join(self.folder, "progress"))


def _read_retired(folder: str) -> list[dict[str, Any]]:
    try:
        url = storage.join(folder, "progress.json")
        return check_progress(storage.read_json(url), url).get("retired", [])
    except (FileNotFoundError, ValueError):
        return []


def _sum_reasons(reasons: Counter[str], reports: list[dict[str, Any]]) -> Counter[str]:
    total = Counter(reasons)
    for report in reports:
        total.update(report["skipped"])
    return total


def _read_reports(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    base = storage.join(folder, "progress")

    def read(name: str) -> dict[str, Any] | None:
        try:
            return check_report(storage.read_json(url := storage.join(base, name)), url)
        except (FileNotFoundError, ValueError):
            return None  # recorded in this moment, or damaged: its worker writes it again

    names = storage.list_files(base)
    for name, report in zip(names, storage.map_urls(read, names), strict=True):
        if report is not None:
            yield name.removesuffix(".json"), report
