"""One live line on a terminal, with a second line beneath it for losses and waiting."""

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from jobs.telemetry import heartbeat, interrupts, logs
from jobs.telemetry.units import format_duration
from pipeline import storage

if TYPE_CHECKING:
    from rich.text import Text

_BAR_CELLS, _NARROW_CELLS = 20, 8
_NARROW = 100  # columns below which the bar is short
_STILL_S = 8.0  # without a change before the line says so


def is_live() -> bool:
    """Whether stderr is a terminal on which a line can be rewritten."""
    return (sys.stderr.isatty() and logs.current_format() == "text"
            and os.environ.get("TERM", "") not in {"dumb", "unknown"})


class LiveLine:
    """A bar at the bottom of a terminal. Log lines and what libraries write to stderr appear above it.

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
                return _cut_text(task.fields["details"])

        class TwoLines(Progress):
            """The bar, and beneath it the second line while there is one."""

            def get_renderables(inner: Any) -> Any:  # noqa: N805
                yield from Progress.get_renderables(inner)
                if text := self._second_line():
                    yield _cut_text(f"  {text}")

        console = Console(stderr=True, highlight=False)
        cells = _BAR_CELLS if shutil.get_terminal_size().columns >= _NARROW else _NARROW_CELLS
        self._below, self._done, self._changed, self._open = "", -1.0, time.monotonic(), True
        # No refresh thread: the driver starts processes, and a fork must not find a lock held.
        self._progress = TwoLines(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(cells, table_column=Column(no_wrap=True)), Details(),
            console=console, auto_refresh=False, redirect_stdout=False)
        self._task = self._progress.add_task(storage.escape_controls(name), details="", total=None)

        def print_line(text: str) -> None:
            with interrupts.defer_interrupts():
                console.print(text, markup=False, emoji=False, soft_wrap=True)

        logs.redirect_lines(print_line)
        heartbeat.refresh_by(self._tick)

    def show(self, done: float, total: float | None, details: str, below: str = "") -> None:
        """Show how much is done, details beside the bar, and losses below it."""
        if done != self._done:
            self._done, self._changed = done, time.monotonic()
        self._below = below
        with interrupts.defer_interrupts():
            self._progress.update(self._task, completed=done, total=total, details=details)
            self._progress.start()  # does nothing if the bar is there already
            self._progress.refresh()

    def close(self) -> None:
        """Leave the last state of the bar on the terminal, and give stderr back."""
        self._open = False
        with interrupts.defer_interrupts():
            self._progress.stop()
        heartbeat.refresh_by(None)
        logs.redirect_lines(None)

    def _second_line(self) -> str:
        if not self._open:  # the log names losses at the end
            return ""
        still = time.monotonic() - self._changed
        waiting = f"nothing new for {format_duration(round(still))}" if still >= _STILL_S else ""
        return "; ".join(filter(None, (waiting, self._below)))

    def _tick(self) -> None:
        """Called each second from another thread."""
        if self._open and time.monotonic() - self._changed >= _STILL_S:
            self._progress.refresh()


def _cut_text(text: str) -> "Text":
    from rich.text import Text
    return Text(storage.escape_controls(text), no_wrap=True, overflow="ellipsis")
