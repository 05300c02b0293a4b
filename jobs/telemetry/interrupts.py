"""SIGTERM and SIGHUP end a command as Ctrl-C does: with cleanup, and with a message how to continue.

SIGHUP comes when the terminal is closed. `nohup` lets a command ignore it, and this stays so.

Python runs the handler of a signal in the main thread, after the native code that this thread is in. So there are two
stages: if a command has not ended `SECONDS` after the signal, another thread ends it.
"""

import contextlib
import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SECONDS = 8.0
"""Seconds between the signal and the second stage."""
_IMPORTS = "<frozen importlib._bootstrap>"
_LOOK_AGAIN_S = 0.1
_ALL: set[int] = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_pipe: tuple[int, int] | None = None  # a signal writes to it, if the second stage is wanted
_exit_code: int | None = None  # once the command has one
_has_raised = False


def forget_raised() -> None:
    """Forget earlier signals, at the start of a command."""
    global _has_raised
    _has_raised = False


def has_raised() -> bool:
    """Whether a signal has raised KeyboardInterrupt. Native code may have raised another error instead."""
    return _has_raised


def convert_sigterm() -> None:
    """Turn SIGTERM into KeyboardInterrupt, and SIGHUP unless it is ignored."""
    if threading.current_thread() is threading.main_thread():
        _handle(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            _handle(signal.SIGHUP)


def handle_ctrl_c() -> None:
    """Let Ctrl-C end the process as SIGTERM does, also inside of an import."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell lets its background jobs ignore it
        _handle(signal.SIGINT)


def _handle(number: int) -> None:
    if _pipe:
        faulthandler.unregister(number)
    signal.signal(number, _interrupt)
    if _pipe:
        # Its handler is native and writes immediately. Then it calls ours.
        faulthandler.register(number, _pipe[1], all_threads=False, chain=True)


def end_for_certain(last_words: Callable[[], None], code: int) -> None:
    """Let the second stage end this process, with this exit code, after a signal. `last_words` is called before.

    A handler that replaces ours, as in training, has as much time as it needs.
    """
    global _pipe
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    threading.Thread(target=_wait_and_end, args=(_pipe[0], last_words, code), daemon=True).start()
    convert_sigterm()


def _wait_and_end(pipe: int, last_words: Callable[[], None], code: int) -> None:
    os.read(pipe, 1)
    # If a thread in native code never lets Python run, this ends the process without Python.
    faulthandler.dump_traceback_later(SECONDS + 1, exit=True, file=os.open(os.devnull, os.O_WRONLY))
    time.sleep(SECONDS)
    with contextlib.suppress(OSError):  # the terminal is closed
        if _exit_code is None:
            last_words()
        sys.stderr.flush()
    os._exit(code if _exit_code is None else _exit_code)


def ignore(exit_code: int) -> None:
    """Ignore SIGTERM, SIGHUP and Ctrl-C while the process ends: an exception there would only print a traceback.

    A second stage that has begun ends the process with `exit_code`.
    """
    global _exit_code
    _exit_code = exit_code
    for number in _ALL:
        signal.signal(number, signal.SIG_IGN)
    # If KeyboardInterrupt passed an exec() of text, `python -m` would end by SIGINT, whatever the exit code. Another
    # evaluation of text resets this.
    eval("0")


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer SIGTERM, SIGHUP and Ctrl-C until the end of the block, because its work cannot be interrupted safely.

    Ray installs its own handler while it starts. An exception of that handler inside native code aborts the process.
    A signal mask would also work, but the daemons that Ray starts would inherit it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _ALL}
    replace = signal.signal

    def kept(number: int, handler: Any) -> Any:
        return before[number] if number in _ALL else replace(number, handler)

    for number in _ALL:
        if before[number] is not signal.SIG_IGN:
            replace(number, lambda number, frame: came.append(number))
    signal.signal = kept  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = replace
        replace(signal.SIGINT, before[signal.SIGINT])
        if before[signal.SIGINT] is _interrupt:
            handle_ctrl_c()
        convert_sigterm()
    if came:
        _start_second_stage()
        raise KeyboardInterrupt


def _start_second_stage() -> None:
    """Start the second stage. The native handler does the same, unless another handler replaced it."""
    if _pipe:
        with contextlib.suppress(BlockingIOError):  # it is full
            os.write(_pipe[1], b"x")


def leave_terminal() -> None:
    """Let output to a closed terminal go to /dev/null, where it is no error: the cleanup prints too."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside of an import: libraries swallow it, or turn it into another error."""
    global _has_raised
    if number == signal.SIGHUP:
        leave_terminal()
    while frame is not None and frame.f_code.co_filename != _IMPORTS:
        frame = frame.f_back
    _start_second_stage()
    if frame is None:
        _has_raised = True
        raise KeyboardInterrupt
    again = threading.Timer(_LOOK_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
