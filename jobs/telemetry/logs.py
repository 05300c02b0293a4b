"""The log, on stderr: lines for people, or with `--log-format json` (RDM_LOG=json) a JSON document for each event."""

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from jobs.runs.labels import stage_labels
from jobs.telemetry import output
from pipeline import storage
from pipeline.stages.types import current_item

FORMATS = ("text", "json")
OURS = ("jobs", "pipeline", "model", "__main__")
"""Packages whose messages are all shown."""
_TORCHRUN_S = 15.0  # torchrun looks at its processes ten times a second, but an end may take seconds
_log = logging.getLogger(__name__)
_warning_text = warnings.formatwarning
_about: dict[str, str] = {}


class _Stderr(logging.StreamHandler):
    """Writes to the current `sys.stderr`, also after a replacement."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.write: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.write is None:
            super().emit(record)
            return
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)

    @property
    def stream(self) -> Any:
        return sys.stderr


_handler = _Stderr()


class _OncePerLibrary(logging.Filter):
    """Passes only the first line of the first record of each other library, because libraries repeat messages."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        library = record.name.partition(".")[0]
        if library in OURS:
            return True
        first, _, rest = record.getMessage().partition("\n")
        record.msg, record.args = f"{library}: {first}{' ...' if rest else ''}", None
        return not (library in self._seen or self._seen.add(library))  # type: ignore[func-returns-value]


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return _escape(output.fit_commands(super().format(record)))


class _Json(logging.Formatter):
    """An event as one line of JSON: time, level, message, and the known labels (dataset, version, stage, run, item)."""

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        event = {"time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
                 "level": record.levelname.lower(), "logger": record.name,
                 "message": output.fit_commands(record.getMessage())}
        held = current_item.get()
        event |= _about if held is None else _known(stage_labels(held[0], held[1]))
        if held is not None:
            event["item"] = held[2]
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["traceback"] = storage.redact_credentials(self.formatException(record.exc_info))
        return json.dumps(event, default=str)


def choose_format(flag: str = "") -> str:
    """The format of the flag, or else of RDM_LOG."""
    form = flag or os.environ.get("RDM_LOG") or "text"
    if form not in FORMATS:
        raise ValueError(f"{'--log-format' if flag else 'RDM_LOG'} = {form!r}: must be {' or '.join(FORMATS)}")
    return form


def current_format() -> str:
    """The current format, to pass to other processes."""
    return "json" if isinstance(_handler.formatter, _Json) else "text"


def configure_logging(form: str = "text", root: str = "") -> None:
    """Log in this format from now on. `root`: the root of the command, for the commands in hints."""
    output.name_root(root)
    logging.basicConfig(level=logging.WARNING, handlers=[_handler])
    _handler.setFormatter(_Json() if form == "json" else _Text())
    logging.captureWarnings(form == "json")
    warnings.formatwarning = _format_warning
    sys.excepthook = _print_exception
    _handler.filters = [] if form == "json" else [_OncePerLibrary()]
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's client also prints what it logs
    # A text log does not list each item, and has the same message of several processes of torchrun once.
    level = logging.WARNING if os.environ.get("RANK", "0") != "0" else logging.INFO
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if form == "json" else level)


def redirect_lines(write: Callable[[str], None] | None) -> None:
    """Pass each line of the log to `write`, which keeps a live bar at the bottom of the terminal. None ends this."""
    _handler.write = write


@contextlib.contextmanager
def label_events(known: dict[str, str]) -> Iterator[None]:
    """Add these labels to the events of this process inside the block."""
    before = dict(_about)
    _about.clear()
    _about.update(_known(known))
    try:
        yield
    finally:
        _about.clear()
        _about.update(before)


def _is_ended_by_torchrun() -> bool:
    """Whether torchrun ends this process within seconds: another one failed before, mostly with the same error."""
    try:
        time.sleep(_TORCHRUN_S)
    except KeyboardInterrupt:
        return True
    return False


def log_exit(text: str, level: int = logging.ERROR, **fields: Any) -> None:
    """Log why the command ends: as text, or as an event with a separate hint."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and (level < logging.ERROR or _is_ended_by_torchrun()):
        return  # the first process of this machine says it
    text = output.fit_commands(text)
    if current_format() == "text":
        sys.stderr.write(_escape(f"error: {text}" if level == logging.ERROR else text) + "\n")
        return
    said, _, hint = text.partition("\nhint: ")
    _log.log(level, "%s", said, extra={"fields": fields | ({"hint": hint} if hint else {})})


def _escape(text: str) -> str:
    return storage.escape_controls(text, output.LAYOUT)


def _format_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                    line: str | None = None) -> str:
    return _escape(_warning_text(message, category, filename, lineno, line))


def _print_exception(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print the traceback of an unhandled error. Its message may quote files of others."""
    sys.stderr.write(_escape("".join(traceback.format_exception(kind, error, trace))))


def _known(named: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in named.items() if value}
