"""`python -m jobs VERB`: data on stdout, logs on stderr.

A verb's module imports torch, Ray and the like inside its functions: `--help` and `status` do not wait for them.

Exit 0: done; 1: failed items, faults or damaged data; 2: invalid usage; 130: stopped by SIGINT, SIGTERM or SIGHUP, run
again to resume.
"""

import argparse
import errno
import logging
import os
import select
import sys
from collections.abc import Sequence

from jobs import __version__
from jobs.cli.options import STOPPED
from jobs.cli.parse import LOOK, check_options, flags_of, parse_command
from jobs.cli.submit import check_needed
from jobs.telemetry import interrupts, logs, output
from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages.types import StageFailed

_log = logging.getLogger(__name__)
_NOTHING_TO_CONTINUE = {*LOOK, "credits", "recipes", "doctor", "plan", "init"}
_NO_WAY = "hint: --root must be a place where this user may read and write, and TMPDIR too"
_GO_ON = "hint: nothing that is recorded is lost; the same command continues from here"
_FREE = ("hint: make room there, gc and rm need a few kB too. TMPDIR names the disk of scratch, RDM_CACHE that of the "
         "cache; the same command continues from here")
_LOST = "hint: python -m jobs verify; it names what is damaged, and the command that makes it again"


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interrupts.convert_sigterm()
    interrupts.forget_raised()
    try:
        output.name_key(_find_flag(arguments, "--sign"))
        logs.configure_logging(_log_format(arguments), _find_flag(arguments, "--root"))
    except ValueError as error:
        return _misuse(str(error))
    try:
        if (code := _inform(arguments)) is not None:
            return code
        check_needed()
        run, options = parse_command(arguments, read_root=True, check=check_options)
        try:
            code = run(options)
        except Exception:
            if interrupts.has_raised():
                raise KeyboardInterrupt from None
            raise
        sys.stdout.flush()
        return code
    except storage.DamagedFile as error:
        logs.log_exit(storage.redact_credentials(_fit_hint(_text(error), arguments)), exit=1)
        return 1
    except ValueError as error:
        return _misuse(_fit_hint(_text(error), arguments))
    except storage.NoBucket as error:
        return _misuse(_text(error))
    except (NotADirectoryError, IsADirectoryError) as error:
        return _misuse(f"{error.filename}: {error.strerror}")
    except (StageFailed, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, StageFailed) and not devices.failure_hint(error):
            raise
        if isinstance(error, BrokenPipeError) and _unheard():
            return 0
        full = storage.disk_full_message(error)
        lost = _lost_message(error, _find_flag(arguments, "--root"))
        text = full or storage.denial_message(error) or storage.lost_folder_message(error) or lost or _text(error)
        if "hint:" not in text and (sentence := devices.failure_hint(error)):
            text = f"{text.splitlines()[0]}\n{sentence}"
        if "hint:" not in text:
            denied = getattr(error, "errno", 0) in {errno.EROFS, errno.EACCES, errno.EPERM}
            text += f"\n{_FREE if full else _NO_WAY if denied else _LOST if lost else _GO_ON}"
        logs.log_exit(storage.redact_credentials(_fit_hint(text, arguments)), exit=1)
        return 1
    except KeyboardInterrupt:
        log_stopped(arguments[:1])
        return STOPPED


def _text(error: BaseException) -> str:
    """The message of an error; the name of its type if it has none, as MemoryError."""
    return str(error).strip() or type(error).__name__


def _lost_message(error: BaseException, root: str) -> str:
    """A sentence if a file of the root was not found, "" if anything else is wrong."""
    if not isinstance(error, FileNotFoundError) or error.filename is None:
        return ""
    name, folder = str(error.filename), storage.normalize(root or output.DEFAULT_ROOT)
    return f"{name} is missing" if name.startswith(f"{folder}/") else ""


def log_stopped(verb: Sequence[str] = ()) -> None:
    """Log that a signal stopped the command. `verb`: its first word, by default that of this process."""
    has_work = not _NOTHING_TO_CONTINUE.intersection(verb or sys.argv[1:2])
    logs.log_exit("stopped" + "; the same command continues from here" * has_work, logging.WARNING, exit=STOPPED)


def _misuse(message: str) -> int:
    logs.log_exit(storage.redact_credentials(message), exit=2)
    return 2


def _fit_hint(text: str, arguments: list[str]) -> str:
    """An error with another hint: only flags of the verb, and commands with the flags that the user typed."""
    from jobs.cli import help
    if not arguments or "\nhint: " not in text:
        return text
    return help.repeat_command(help.fit_flags(text, arguments[0]), arguments)


def _log_format(arguments: list[str]) -> str:
    """The format of the log, before the rest of the command line is read."""
    return logs.choose_format(_find_flag(arguments, "--log-format", "--log_format"))


def _find_flag(arguments: list[str], *names: str) -> str:
    """The value of a flag, before the rest of the command line is read; "" without one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument(*names, dest="value", default="")
    try:
        return first.parse_known_args(arguments)[0].value
    except argparse.ArgumentError:  # tyro names it when it reads the whole command line
        return ""


def _inform(arguments: list[str]) -> int | None:
    """Answer a command line that asks about the program. Returns the exit code, or None if it names work to do."""
    from jobs.cli import help
    first, rest = (arguments or [""])[0], arguments[1:]
    asked = {"-h", "--help", "--help-all"}.intersection(flags_of(first, rest))
    if not first or first in {"-h", "--help", "--help-all"}:
        help.print_overview()
    elif first == "--version":
        output.print_text(f"{help.PROGRAM} {__version__}")
    elif first == "--completion":
        if rest not in ([shell] for shell in help.SHELLS):
            raise ValueError(f"--completion {' '.join(rest)}: must be one of {', '.join(help.SHELLS)}\n"
                             f"hint: --completion bash")
        output.print_text(help.SHELLS[rest[0]], end="")
    elif first == "--complete":
        output.print_text("".join(f"{word}\n" for word in help.complete(rest)), end="")
    elif asked:
        help.print_help(first, everything="--help-all" in asked)
    else:
        return None
    sys.stdout.flush()  # here, where a closed pipe is no error
    return 0 if arguments else 2


def _unheard() -> bool:
    """Whether the reader of stdout has closed the pipe, as `head` does. Further output is then discarded."""
    out = select.poll()
    out.register(sys.stdout.fileno(), 0)  # poll reports a pipe without a reader also for an empty mask
    if closed := bool(out.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
