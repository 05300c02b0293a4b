"""SIGTERM ends a command as Ctrl-C does: tidily, and with a word on how to go on."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_BOTH: set[int] = {signal.SIGTERM, signal.SIGINT}


def convert_sigterm() -> None:
    """Turn SIGTERM into KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def ignore() -> None:
    """Ignore SIGTERM and Ctrl-C while the process ends: an exception there would only print a traceback."""
    for number in _BOTH:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Put off SIGTERM and Ctrl-C to the end: what begins here cannot be left half-way without harm.

    Ray, while it starts, puts a handler of its own in place, and what that raises inside of native code aborts the
    process. Masking the signals would do too, but the daemons that Ray starts would inherit the mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _BOTH}
    replace = signal.signal

    def kept(number: int, handler: Any) -> Any:
        return before[number] if number in _BOTH else replace(number, handler)

    for number in _BOTH:
        replace(number, lambda number, frame: came.append(number))
    signal.signal = kept  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = replace
        replace(signal.SIGINT, before[signal.SIGINT])
        convert_sigterm()
    if came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
