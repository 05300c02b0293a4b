"""Entry point of `rdm VERB ...` and `python -m jobs VERB ...`."""

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType

_STOPPED = 130
_NOTHING_DONE = "stopped before anything was done\n"


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, _NOTHING_DONE.encode())
    os._exit(_STOPPED)  # no `finally` of a half imported module may run


def _replace_closed_streams() -> None:
    """Read from and write to /dev/null where the caller closed a stream, as in `status >&-`. Python makes it None.

    It takes the number of the closed stream, as the lowest that is free. Otherwise the next file that is opened would
    get it, and what a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # as the streams of a shell
            setattr(sys, name, stream)


_replace_closed_streams()
# Before the first import that takes long. A shell lets its background jobs ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

from jobs.telemetry import interrupts  # noqa: E402


def run_program() -> None:
    """Run the command line of this process, and end it with the exit code."""
    said = _NOTHING_DONE
    try:
        with interrupts.defer_interrupts():  # what is imported here takes a second
            from jobs.cli.main import log_stopped, main
            from jobs.cli.options import STOPPED
            from jobs.telemetry import heartbeat
            from jobs.telemetry.live_line import is_live
        interrupts.end_for_certain(log_stopped, STOPPED)
        interrupts.handle_ctrl_c()
        if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun starts is enough
            heartbeat.start(sys.argv[1] if len(sys.argv) > 1 else "help", is_live)
        said = ""  # `main` says it
        code = main()
    except KeyboardInterrupt:
        code = _STOPPED
        with contextlib.suppress(OSError):  # the terminal is closed
            sys.stderr.write(said)
    interrupts.ignore(code)  # the work is done, and the exit code says so
    _end_quickly(code)


def _end_quickly(code: int) -> None:
    """End the process without the teardown of Python, which looks at all objects of torch for a second.

    It waits for the threads, and calls the functions of `atexit`, as the teardown does.
    """
    import threading  # not above, where Ctrl-C has no handler yet

    from jobs.telemetry import heartbeat
    with heartbeat.doing("ending"):  # Ray takes seconds
        threading._shutdown()  # type: ignore[attr-defined]
        if colorama := sys.modules.get("colorama.initialise"):  # Ray has it; it prints an escape sequence at the end
            atexit.unregister(colorama.reset_all)
        atexit._run_exitfuncs()
    heartbeat.stop()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the reader is gone, or the stream is closed
    os._exit(code)


if __name__ == "__main__":
    run_program()
