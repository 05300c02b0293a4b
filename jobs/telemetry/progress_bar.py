"""The progress of a stage on stderr: a live bar on a terminal, a log line every few seconds elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs.telemetry import interrupts, logs
from jobs.telemetry.units import format_bytes, format_duration, format_share
from pipeline import storage
from pipeline.stages.progress import Tally
from pipeline.stages.types import count_row_failures

EVERY_S = 10.0  # between two log lines
_BAR_CELLS = 20
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def show_progress(name: str) -> Iterator[Callable[[Tally], None]]:
    """A function that shows a tally whenever it changes. The bar is closed at the end, also after an exception.

    Counts are rows where their number is known, items otherwise.
    """
    bar: _Bar | None = None
    logged = time.monotonic()

    def watch(tally: Tally) -> None:
        nonlocal bar, logged
        now, finished = tally.now, tally.done_items == tally.items
        if _is_live():
            bar = bar or _Bar(name)
            bar.show(now)
            if finished:
                bar.close()
                bar = None  # more items may follow: rows that are retried
        elif time.monotonic() - logged > EVERY_S or finished:
            logged = time.monotonic()
            _log.info("%s: %s", name, describe_progress(now), extra={"fields": now})

    try:
        yield watch
    finally:
        if bar is not None:
            bar.close()


def _is_live() -> bool:
    """Whether stderr is a terminal on which a line can be rewritten."""
    return (sys.stderr.isatty() and logs.current_format() == "text"
            and os.environ.get("TERM", "") not in {"dumb", "unknown"})


class _Bar:
    """One line at the bottom of a terminal. Log lines and what libraries write to stderr appear above it.

    Ctrl-C waits until a line is written: rich writes a line again that an exception interrupted.
    """

    def __init__(self, name: str) -> None:
        # Most commands show no bar, and need not wait 0.03 s for rich to load.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class Details(ProgressColumn):
            """Counts, which are cut at the right edge of a narrow terminal."""

            def render(self, task: Task) -> Text:
                return Text(storage.escape_controls(task.fields["details"]), no_wrap=True, overflow="ellipsis")

        console = Console(stderr=True, highlight=False)
        # No refresh thread: the driver starts processes, and a fork must not find a lock held.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(_BAR_CELLS, table_column=Column(no_wrap=True)), Details(),
            console=console, auto_refresh=False, redirect_stdout=False)
        self._task = self._progress.add_task(storage.escape_controls(name), details="", total=None)

        def print_line(text: str) -> None:
            with interrupts.defer_interrupts():
                console.print(text, markup=False, emoji=False, soft_wrap=True)

        logs.redirect_lines(print_line)

    def show(self, now: dict[str, Any]) -> None:
        """Show the counts of a tally."""
        done, total, unit = ((now["rows"], now["of_rows"], "rows") if now["of_rows"]
                             else (now["items"], now["of_items"], "items"))
        time_left = f", {format_duration(now['seconds_left'])} left" if now["seconds_left"] and done < total else ""
        details = (f"{format_share(done, total, 0):>4}  {done} of {total} {unit}{time_left}, "
                   f"{now['rows_per_s']:.0f} rows/s, {_rest(now)}")
        with interrupts.defer_interrupts():
            self._progress.update(self._task, completed=done, total=total, details=details)
            self._progress.start()  # does nothing if the bar is there already
            self._progress.refresh()

    def close(self) -> None:
        """Leave the last state on the terminal, and give stderr back."""
        with interrupts.defer_interrupts():
            self._progress.stop()
        logs.redirect_lines(None)


def describe_progress(now: dict[str, Any]) -> str:
    """The counts of a tally in one line."""
    total = f" of {now['of_rows']}" if now["of_rows"] else ""
    again = f" ({now['retried']} tried again)" if now["retried"] else ""
    unfinished = now["seconds_left"] and now["items"] < now["of_items"]
    time_left = f", {format_duration(now['seconds_left'])} left" if unfinished else ""
    return (f"{now['items']} of {now['of_items']} items, {now['rows']}{total} rows{again}, "
            f"{now['rows_per_s']:.0f} rows/s, {_rest(now)}{time_left}")


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
    # The share is one of rows, because a row may give several samples.
    rows = now["rows"] - now["retried"]
    failed_rows = count_row_failures(now["skipped"])
    bound = "at most " if failed_rows < sum(now["skipped"].values()) else ""  # how many rows more is unknown
    share = f"{bound}{format_share(rows - failed_rows, rows)} good, " if rows else ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in list(now["skipped"].items())[:4])
    failed = f", {now['failed_items']} items failed" if now["failed_items"] else ""
    return f"{share}{format_bytes(now['bytes'])}{failed}" + (f", left out: {reasons}" if reasons else "")
