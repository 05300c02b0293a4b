"""SIGTERM ends a command as Ctrl-C does: tidily, and with a word on how to go on."""

import signal
import threading
from types import FrameType


def listen() -> None:
    """Turn SIGTERM into KeyboardInterrupt; again after Ray, which brings a handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
