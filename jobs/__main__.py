"""Entry point of `rdm VERB ...` and `python -m jobs VERB ...`."""

import sys

from jobs.telemetry import interrupts


def run_program() -> int:
    """Run the command line of this process. Returns the exit code."""
    try:
        with interrupts.defer_interrupts():  # what is imported here takes a second
            from jobs.cli.main import log_stopped, main
            from jobs.cli.options import STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything was done\n")
        return 130
    interrupts.end_for_certain(log_stopped, STOPPED)
    code = main()
    interrupts.ignore(code)  # the work is done, and the exit code says so
    return code


if __name__ == "__main__":
    raise SystemExit(run_program())
