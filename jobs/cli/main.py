"""`python -m jobs VERB`: stdout is data, stderr is log.

What loads torch or Ray is imported where it is used: a look at the status is not to wait for them.

Exit 0: done; 1: failed items or faults; 2: misuse; 130: stopped by SIGINT or SIGTERM, to be gone on with.
"""

import argparse
import errno
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any

import tyro

from jobs import commands, verbs
from jobs.cli.submit import check_needed, make_submission, run_submission
from jobs.config.settings import Settings
from jobs.config.toml import resolve_settings
from jobs.telemetry import interrupts, logs
from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages.types import StageFailed

_log = logging.getLogger(__name__)
_NO_WAY = "hint: --root must be a place where this user may write, and TMPDIR too"
_GO_ON = "hint: nothing that is recorded is lost; the same command goes on from here"


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interrupts.listen()
    try:
        logs.speak(_log_format(arguments))
    except ValueError as error:
        return _misuse(str(error))
    if not arguments or arguments[0] in {"-h", "--help"}:
        _print_help(_overview())
        return 0 if arguments else 2
    try:
        check_needed()
        act, command, settings = parsed(arguments)
        code = act(command, settings)
        sys.stdout.flush()
        return code
    except SystemExit:  # tyro printed the help, or what is wrong with a flag
        _print_help("")
        raise
    except ValueError as error:
        return _misuse(str(error))
    except (NotADirectoryError, IsADirectoryError) as error:
        return _misuse(f"{error.filename}: {error.strerror}")
    except (StageFailed, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, StageFailed) and not devices.explain(error):
            raise
        if isinstance(error, BrokenPipeError) and _unheard():
            return 0
        text = storage.disk_full_message(error) or str(error)
        if "hint:" not in text and (sentence := devices.explain(error)):
            text = f"{text.splitlines()[0]}\n{sentence}"
        if "hint:" not in text:
            text += f"\n{_NO_WAY if getattr(error, 'errno', 0) in {errno.EROFS, errno.EACCES, errno.EPERM} else _GO_ON}"
        logs.last_word(storage.redact_credentials(text), exit=1)
        return 1
    except KeyboardInterrupt:
        logs.last_word("stopped; the same command goes on from here", logging.WARNING, exit=verbs.STOPPED)
        return verbs.STOPPED


def parsed(arguments: Sequence[str]) -> tuple[Callable[[Any, Settings], int], Any, Settings]:
    """A command line as what acts on it, what it says, and the settings below that; ValueError for no such verb."""
    verb, flags = arguments[0], list(arguments[1:])
    if verb not in VERBS:
        raise ValueError(f"there is no verb {verb!r}\nhint: one of {', '.join(VERBS)}")
    kind, act = VERBS[verb]
    settings = Settings()
    if kind is commands.SubmitCommand:  # its own flags end where the other verb begins
        end = next((number for number, word in enumerate(flags) if word in VERBS), len(flags))
        flags.insert(end, "--")
    else:
        settings = _settings(flags)
    return act, tyro.cli(kind, args=flags, default=_default(kind, settings), prog=f"python -m jobs {verb}"), settings


def _misuse(message: str) -> int:
    logs.last_word(storage.redact_credentials(message), exit=2)
    return 2


def _log_format(arguments: list[str]) -> str:
    """How to speak, before anything can be said about the rest of the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--log-format", "--log_format", default="")
    try:
        return logs.chosen(first.parse_known_args(arguments)[0].log_format)
    except argparse.ArgumentError:  # it will be said again by who reads the whole command line
        return logs.chosen()


def _print_help(text: str) -> None:
    """Print and flush here, where a reader that stopped reading is no error; at exit Python would print a traceback."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        if not _unheard():
            raise


def _unheard() -> bool:
    """Whether whoever read the output has seen enough, as `head` does; the rest of it goes nowhere then."""
    out = select.poll()
    out.register(sys.stdout.fileno(), 0)  # a pipe without a reader says so unasked
    if gone := bool(out.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _settings(arguments: list[str]) -> Settings:
    """The settings before flags: recipe and file are read first, for they are the flags' defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="")
    first.add_argument("--config", default="")
    known, _ = first.parse_known_args(arguments)
    return resolve_settings(known.recipe, known.config)


def _default(kind: type, settings: Settings) -> Any:
    """An instance of a verb's dataclass with the settings in place of its sections; the rest is asked for."""
    values: dict[str, Any] = {}
    for name in kind.__dataclass_fields__:
        if name in {"common", "stage"}:
            values[name] = {"common": commands.Common, "stage": commands.Rebuild}[name]()
        elif name in settings.__dataclass_fields__:
            values[name] = getattr(settings, name)
        elif kind.__dataclass_fields__[name].default is not MISSING:
            values[name] = kind.__dataclass_fields__[name].default
        elif kind.__dataclass_fields__[name].default_factory is not MISSING:
            values[name] = kind.__dataclass_fields__[name].default_factory()
        else:
            values[name] = tyro.MISSING
    return kind(**values)


def _submit(command: commands.SubmitCommand, settings: Settings) -> int:
    if not command.words or command.words[0] == "submit":
        raise ValueError("submit needs a verb\nhint: python -m jobs submit --wait embed NAME --root s3://...")
    _, inner, settings = parsed(command.words)
    return run_submission(make_submission(command.words, inner, settings, command), command)


VERBS = verbs.VERBS | {"submit": (commands.SubmitCommand, _submit)}


def _overview() -> str:
    lines = [f"  {name:<10} {(kind.__doc__ or '').strip()}" for name, (kind, _) in VERBS.items()]
    return ("usage: python -m jobs VERB [...]; python -m jobs VERB --help\n\n" + "\n".join(lines) +
            "\n\nEvery verb takes --root (a folder or s3://...), --local (no Ray) and --dry-run.\n"
            "To go on after any fault, run the same command again.\n")
