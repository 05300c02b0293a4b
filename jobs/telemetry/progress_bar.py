"""The progress of a stage on stderr: a live bar on a terminal, a log line every few seconds elsewhere."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs.telemetry.live_line import LiveLine, is_live
from jobs.telemetry.units import format_bytes, format_duration, format_number, format_share
from pipeline import storage
from pipeline.stages.progress import Tally
from pipeline.stages.types import count_row_failures

EVERY_S = 5.0
"""Seconds between two log lines. A driver looks every 5 s, so a line follows within 10 s."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def show_progress(name: str) -> Iterator[Callable[[Tally], None]]:
    """A function that shows a tally whenever it changes. The bar is closed at the end, also after an exception.

    Counts are rows where their number is known, items otherwise.
    """
    line: LiveLine | None = None
    begun = logged = time.monotonic()

    def watch(tally: Tally) -> None:
        nonlocal line, logged
        now, finished = tally.now, tally.done_items == tally.items
        if is_live():
            line = line or LiveLine(name)
            _show_tally(line, now)
            if finished:
                line.close()
                line = None  # more items may follow: rows that are retried
        elif time.monotonic() - logged > EVERY_S or finished:
            logged = time.monotonic()
            _log.info("%s: %s", name, describe_progress(now, logged - begun), extra={"fields": now})

    try:
        yield watch
    finally:
        if line is not None:
            line.close()


def _show_tally(line: LiveLine, now: dict[str, Any]) -> None:
    done, total, unit = ((now["rows"], now["of_rows"], "rows") if now["of_rows"]
                         else (now["items"], now["of_items"], "items"))
    time_left = f", {format_duration(now['seconds_left'])} left" if now["seconds_left"] and done < total else ""
    line.show(done, total, f"{format_share(done, total, 0):>4}  {done} of {total} {unit}{time_left}, "
                           f"{format_number(now['rows_per_s'])} rows/s, {_good_share(now)}{format_bytes(now['bytes'])}",
              _describe_failures(now))


def describe_progress(now: dict[str, Any], seconds: float | None = None) -> str:
    """The counts of a tally in one line. `seconds`: the time since the stage began, if that is known."""
    total = f" of {now['of_rows']}" if now["of_rows"] else ""
    if not (now["rows"] or now["items"] or now["skipped"]):
        rows = total and f", 0{total} rows"
        time_taken = "" if seconds is None else f" for {format_duration(round(seconds))}"
        return f"0 of {now['of_items']} items{rows}, the first ones are at work{time_taken}"
    again = f" ({now['retried']} tried again)" if now["retried"] else ""
    unfinished = now["seconds_left"] and now["items"] < now["of_items"]
    time_left = f", {format_duration(now['seconds_left'])} left" if unfinished else ""
    return (f"{now['items']} of {now['of_items']} items, {now['rows']}{total} rows{again}, "
            f"{format_number(now['rows_per_s'])} rows/s, {_rest(now)}{time_left}")


def describe_steps(now: dict[str, Any]) -> str:
    """The step and the loss of a training run."""
    loss = f", loss {now['loss']:.4f}" if now.get("loss") is not None else ""
    return f"step {now['step']} of {now['of_steps']}{loss}"


def describe_pace(now: dict[str, Any]) -> str:
    """The rate of a training run, and the time that it has left if that is known."""
    time_left = f", {format_duration(now['seconds_left'])} left" if now["seconds_left"] else ""
    rate = format_number(now["rows_per_s"] or None)  # a single step has no rate yet
    return f"{rate} samples/s{time_left}"


def describe_retired(workers: list[dict[str, Any]]) -> str:
    """A sentence on workers that were retired; empty if there are none."""
    if not workers:
        return ""
    last = workers[-1]
    where = f"{last['host']}" + (f", {last['card']}" if last["card"] else f", node {last['node'][:8]}")
    items = sum(worker["items"] for worker in workers)
    return (f"{len(workers)} worker{'s' * (len(workers) > 1)} retired after {items} failed item{'s' * (items != 1)}, "
            f"the last on {where}: {last['reason']}")


def describe_losses(totals: dict[str, Any], folder: str) -> str:
    """Counts of samples that were left out, then of warnings, and the path of the ledger.

    `totals` are those of a manifest. Empty if there are none.
    """
    groups = [f"{verb} {', '.join(f'{count} {reason}' for reason, count in totals[name].items())}"
              for name, verb in (("skipped", "left out"), ("noted", "kept with a warning:")) if totals[name]]
    return f"{'; '.join(groups)}; {storage.join(folder, 'ledger')} names each" if groups else ""


def describe_devices(devices: dict[str, int]) -> str:
    """The devices and precisions of a stage, the most frequent first. Empty for stages without tensors."""
    names = [name for name in devices if name.rpartition(", ")[2] in {"fp32", "bf16", "fp16"}]
    return f"on {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") if names else ""


def _rest(now: dict[str, Any]) -> str:
    return ", ".join(filter(None, (f"{_good_share(now)}{format_bytes(now['bytes'])}", _describe_failures(now))))


def _good_share(now: dict[str, Any]) -> str:
    # The share is one of rows, because a row may give several samples.
    rows = now["rows"] - now["retried"]
    failed_rows = count_row_failures(now["skipped"])
    good = rows - failed_rows - now.get("empty", 0)
    # How many rows more are lost is unknown.
    bound = "" if failed_rows == sum(now["skipped"].values()) else "less than " if good == rows else "at most "
    return f"{bound}{format_share(good, rows)} good, " if rows else ""


def _describe_failures(now: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in list(now["skipped"].items())[:4])
    return ", ".join(filter(None, (f"{now['failed_items']} items failed" if now["failed_items"] else "",
                                   f"left out: {reasons}" if reasons else "")))
