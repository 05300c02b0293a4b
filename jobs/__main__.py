"""Entry point of `rdm VERB ...` and `python -m jobs VERB ...`."""

import os
import sys

from jobs.telemetry import interrupts


def run_program() -> int:
    """Run the command line of this process. Returns the exit code."""
    try:
        with interrupts.defer_interrupts():  # what is imported here takes a second
            from jobs.cli.main import log_stopped, main
            from jobs.cli.options import STOPPED
            from jobs.telemetry import heartbeat
            from jobs.telemetry.live_line import is_live
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything was done\n")
        return 130
    interrupts.end_for_certain(log_stopped, STOPPED)
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun starts is enough
        heartbeat.start(sys.argv[1] if len(sys.argv) > 1 else "help", is_live)
    code = main()
    heartbeat.stop()
    interrupts.ignore(code)  # the work is done, and the exit code says so
    return code


if __name__ == "__main__":
    raise SystemExit(run_program())
