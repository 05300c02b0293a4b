"""Commands write to stdout by these functions: text for people, or JSON. No other file prints."""

import json
import re
import sys
from typing import Any

from pipeline import storage

LAYOUT = "\n\t"
# Bold and its end. tables.render makes them on a terminal.
_STYLE = re.compile("(\x1b\\[1m|\x1b\\[0m)")
_COLOR = re.compile("\x1b\\[[0-9;]*m")


def print_text(text: str, end: str = "\n") -> None:
    """Print text for people. Control characters in it become visible escapes, but for lines, tabs and bold type."""
    print(escape_text(text), end=end, flush=True)


def escape_text(text: str) -> str:
    """Text as `print_text` prints it."""
    parts = _STYLE.split(text) if sys.stdout.isatty() else [text]
    return "".join(part if _STYLE.fullmatch(part) else storage.escape_controls(part, LAYOUT) for part in parts)


def print_json(document: Any, indent: int | None = None) -> None:
    """Print a JSON document. All characters but those of ASCII are escaped."""
    print(json.dumps(document, indent=indent, ensure_ascii=True), flush=True)


def plain_log(text: str) -> str:
    """A piece of another process's log for stderr: without colors, other control characters as visible escapes."""
    return storage.escape_controls(_COLOR.sub("", text), LAYOUT)
