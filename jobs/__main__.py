"""Entry point of `rdm VERB ...` and `python -m jobs VERB ...`."""

import gc
import os
import signal
import sys
from types import FrameType

_STOPPED = 130
_NOTHING_DONE = "stopped before anything was done\n"


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, _NOTHING_DONE.encode())
    os._exit(_STOPPED)  # no `finally` of a half imported module may run


# Before the first import that takes long. A shell lets its background jobs ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

from jobs.telemetry import interrupts  # noqa: E402


def run_program() -> int:
    """Run the command line of this process. Returns the exit code."""
    said = _NOTHING_DONE
    try:
        with interrupts.defer_interrupts():  # what is imported here takes a second
            from jobs.cli.main import log_stopped, main
            from jobs.cli.options import STOPPED
            from jobs.telemetry import heartbeat
            from jobs.telemetry.live_line import is_live
        interrupts.handle_ctrl_c()
        interrupts.end_for_certain(log_stopped, STOPPED)
        if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun starts is enough
            heartbeat.start(sys.argv[1] if len(sys.argv) > 1 else "help", is_live)
        said = ""  # `main` says it
        code = main()
        heartbeat.stop()
    except KeyboardInterrupt:
        code = _STOPPED
        sys.stderr.write(said)
    interrupts.ignore(code)  # the work is done, and the exit code says so
    gc.freeze()  # Python would search all objects of torch and the like for cycles at its end, which takes a second
    return code


if __name__ == "__main__":
    raise SystemExit(run_program())
