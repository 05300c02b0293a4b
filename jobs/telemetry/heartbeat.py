"""Show what a command waits for if it logs nothing for a while: slow imports, the start of Ray, a download, a lease.

The main thread may be in native code for minutes, so another thread reports. On a terminal it rewrites one line. That
line is removed before a command or a library writes to stdout or stderr. Elsewhere the thread logs a line.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs.telemetry.units import format_duration
from pipeline import storage

QUIET_S = 8.0
"""Seconds without a message before a line is logged."""
_LIVE_S = 2.0  # the same for the line that is rewritten
_CLEAR = "\r\x1b[2K"
_log = logging.getLogger(__name__)
_last = time.monotonic()  # when something was shown
_is_line_open = False  # the last text that was shown ended inside a line
_doing: list[tuple[str, float]] = []  # what the command does, with the time it began; the innermost last
_refresh: Callable[[], None] | None = None
_shown = threading.Event()  # the line is on the terminal
_stopped = threading.Event()


class _Watched:
    """A stream, with a note of each text that is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        global _is_line_open
        if text:
            _remove_line()
            # A bar of a library begins with a return, and may be erased.
            _is_line_open = not text.endswith("\n") and "\r" not in text
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def start(verb: str, is_live: Callable[[], bool]) -> None:
    """Watch this process from now on. `is_live`: whether a line of stderr can be rewritten."""
    global _last
    sys.stdout, sys.stderr = _Watched(sys.stdout), _Watched(sys.stderr)
    # torchrun has been silent while it started this process.
    _last = 0.0 if "RANK" in os.environ else time.monotonic()
    _doing.append((verb, time.monotonic()))
    threading.Thread(target=_watch, args=(is_live,), name="heartbeat", daemon=True).start()


def stop() -> None:
    """Be silent from now on: the command waits for its user, has its own display, or ends."""
    _stopped.set()
    _remove_line()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Name the work of the block, such as "starting Ray". The line shows it if it takes long.

    Time counts from the first of the open blocks with this name: the stage `sample` continues the verb `sample`.
    """
    began = next((began for name, began in _doing if name == what), time.monotonic())
    _doing.append(entry := (what, began))
    try:
        yield
    finally:
        _doing.remove(entry)


def refresh_by(refresh: Callable[[], None] | None) -> None:
    """Call this function instead of showing a line. None restores the line."""
    global _refresh
    _refresh = refresh


def _watch(is_live: Callable[[], bool]) -> None:
    while not _stopped.wait(1.0):
        quiet = time.monotonic() - _last
        if _refresh:
            _refresh()
        elif is_live():
            if quiet >= _LIVE_S:
                _rewrite(_describe())
        elif quiet >= QUIET_S:
            _log.info("%s", _describe())  # which counts as output


def _remove_line() -> None:
    """Remove the live line and restart the clock, before something is shown."""
    global _last
    _last = time.monotonic()
    if _shown.is_set():
        _shown.clear()
        _write_line(_CLEAR)


def _describe() -> str:
    what, began = _doing[-1]
    return f"{what}: at work for {format_duration(round(time.monotonic() - began))}"


def _rewrite(text: str) -> None:
    global _is_line_open
    columns = shutil.get_terminal_size().columns
    if not _stopped.is_set():
        _shown.set()
        _write_line(("\n" if _is_line_open else _CLEAR) + storage.escape_controls(text)[:columns - 1])
        _is_line_open = False


def _write_line(text: str) -> None:
    """Write to stderr without a note."""
    stream = sys.stderr._stream if isinstance(sys.stderr, _Watched) else sys.stderr
    stream.write(text)
    stream.flush()
