"""Decode suspicious images in a process of their own, with limits of memory and time.

A process that is killed, crashes, or runs out of memory costs one image. Its limits depend on the size of the image.
The limit of time is for the CPU, so a busy machine refuses the same images as an idle one.
"""

import atexit
import contextlib
import fcntl
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.hardware.memory import machine_memory
from pipeline.media.types import BadImage

MOST_BYTES = 64 << 20
"""Encoded bytes above which every image is suspicious."""
MOST_PIXELS = 1 << 25
"""Pixels above which every image is suspicious."""
_BASE_SECONDS, _SECONDS_PER_MILLION_PIXELS = 30.0, 2.0
_BASE_MEMORY, _BYTES_PER_PIXEL = 1 << 30, 64
"""16-bit images take 40 bytes for a pixel while they are converted."""
_PIPE_BYTES = 1 << 20
_LEAST_BYTES_PER_PIXEL = 8
"""The decoded image takes these, here and in the other process."""

_idle: list["_Process"] = []
_large = threading.Lock()
"""Held for an image of many pixels: one at a time in a process."""
_in_child = False


class NeedsIsolation(Exception):
    """An image that is suspicious by what its header says."""


class _Process:
    """A process that calls functions, one after another."""

    def __init__(self) -> None:
        # A new session: Ctrl-C in a terminal is for the command, which may be at the end of an item.
        self.process = subprocess.Popen(
            # It loads the decoders before any limit is set.
            [sys.executable, "-P", "-c",
             "from pipeline.media import decode, isolation; decode.register_extra_formats(); isolation.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                              "OPENBLAS_NUM_THREADS": "1"})
        for pipe in (self.process.stdin, self.process.stdout):
            if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux: fewer turns for an image
                with contextlib.suppress(OSError):
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[arg-type]
        if not self.process.stdout or self.process.stdout.read(1) != b"\n":
            raise RuntimeError("the process that decodes suspicious images does not start")

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """(whether it returned, what it returned or the reason and detail of a BadImage). EOFError if it died."""
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump((function, arguments), self.process.stdin, protocol=5)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (BrokenPipeError, pickle.UnpicklingError) as error:
            raise EOFError from error

    def close(self) -> int:
        """Kill the process if it still lives. Returns its exit status."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return self.process.wait()


def call(function: Callable[..., Any], *arguments: Any, large: bool = False) -> Any:
    """The result of a function of a module, called in another process.

    BadImage with its own reason, or too_slow, too_much_memory, or corrupt if the decoder crashed. `large`: an image of
    many pixels.
    """
    if _in_child:
        return function(*arguments)
    with _large if large else contextlib.nullcontext():
        status = 0
        for _ in range(2):  # the kernel may kill it for the memory of others
            try:
                process = _idle.pop()
            except IndexError:
                process = _Process()
            try:
                returned, result = process.call(function, arguments)
            except EOFError:
                status = process.process.wait()
                process.close()
                if status == -signal.SIGKILL:
                    continue
                break
            except BaseException:
                process.close()
                raise
            _idle.append(process)
            if returned:
                return result
            raise BadImage(*result)
    if status in {-signal.SIGPROF, -signal.SIGALRM}:
        raise BadImage("too_slow", "it took more than its time")
    if status == -signal.SIGKILL:
        raise BadImage("too_much_memory", "its decoder was killed")
    raise BadImage("corrupt", f"its decoder crashed (exit status {status})")


def is_child() -> bool:
    """Whether this is a process of `call`."""
    return _in_child


def allow(pixels: int) -> None:
    """Set the limits for an image of so many pixels. Does nothing outside of a process of `call`.

    BadImage with the reason too_much_memory if this machine has too little memory for it.
    """
    if not _in_child:
        return
    room = machine_memory() // 2
    if _LEAST_BYTES_PER_PIXEL * pixels > room:
        raise BadImage("too_much_memory", f"{pixels} pixels, and {room >> 20} MiB may be used")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = _virtual_memory() + min(room, _BASE_MEMORY + _BYTES_PER_PIXEL * pixels)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    seconds = _BASE_SECONDS + _SECONDS_PER_MILLION_PIXELS * pixels / 1e6
    # Their default action ends the process, whatever native code it is in. The second is for a process that waits.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def serve() -> None:
    """Call the functions that come on stdin, until it ends or the parent does."""
    global _in_child
    _in_child = True
    parent = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the kernel kills this process before any other
        Path("/proc/self/oom_score_adj").write_text("1000")
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    answers.write(b"\n")
    answers.flush()
    while True:
        try:
            function, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            allow(0)
            answer = True, function(*arguments)
        except BadImage as bad:
            answer = False, (bad.reason, bad.detail)
        except MemoryError:
            answer = False, ("too_much_memory", "more than its limit")
        except Exception as error:
            answer = False, ("corrupt", f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        pickle.dump(answer, answers, protocol=5)
        answers.flush()
        del function, arguments, answer


def _follow(parent: int) -> None:
    """End this process after its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _virtual_memory() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 4 << 30


def _forget() -> None:
    """After a fork: the processes belong to the parent."""
    _idle.clear()


def _close() -> None:
    while _idle:
        _idle.pop().close()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
