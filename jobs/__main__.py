"""Entry point of `python -m jobs VERB ...`."""

import sys

from jobs.telemetry import interrupts

if __name__ == "__main__":
    try:
        with interrupts.defer_interrupts():  # what is imported here takes a second
            from jobs.cli.main import log_stopped, main
            from jobs.cli.options import STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything was done\n")
        raise SystemExit(130) from None
    interrupts.end_for_certain(log_stopped, STOPPED)
    code = main()
    interrupts.ignore(code)  # the work is done, and the exit code says so
    raise SystemExit(code)
