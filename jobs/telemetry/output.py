"""Commands write to stdout by these functions: text for people, or JSON. No other file prints."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import storage

PROGRAM = "rdm" if Path(sys.argv[0]).name == "rdm" else "python -m jobs"
"""How the user called the program."""
DEFAULT_ROOT = "data"
"""The root of a command that names none."""
LAYOUT = "\n\t"
_LINE = 80  # characters of a line of a result
# Bold and its end. tables.render makes them on a terminal.
_STYLE = re.compile("(\x1b\\[1m|\x1b\\[0m)")
# A command ends where a line, a sentence or an alternative ends. The words of `submit` are those of another verb.
# The recipes are the same for every root.
_COMMAND = re.compile(r"python -m jobs (?!VERB|submit\b|recipes\b)[a-z]+(?:'[^'\n]*'|\"[^\"\n]*\"|"
                      r"(?!; |, | && |\. |\.?$| or |[\n)`\\]|\s*python -m jobs ).)*", re.MULTILINE)
_ROOT = re.compile(r"(?<!\S)--root\b")
_COLOR = re.compile("\x1b\\[[0-9;]*m")
_root = ""
_key = ""


def print_text(text: str, end: str = "\n") -> None:
    """Print text. Control characters become visible escapes, except for line ends, tabs and bold type."""
    _write(escape_text(text) + end)


def escape_text(text: str) -> str:
    """Text as `print_text` prints it."""
    parts = _STYLE.split(text) if sys.stdout.isatty() else [text]
    return "".join(part if _STYLE.fullmatch(part) else storage.escape_controls(part, LAYOUT) for part in parts)


def escape_document(value: Any) -> Any:
    """A JSON document with every text in it as `storage.escape_controls` makes it, for programs that show it."""
    if isinstance(value, dict):
        return {escape_document(key): escape_document(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escape_document(inner) for inner in value]
    return storage.escape_controls(value) if isinstance(value, str) else value


def print_json(document: Any, indent: int | None = None) -> None:
    """Print a JSON document. Characters outside of ASCII are escaped."""
    _write(json.dumps(document, indent=indent, ensure_ascii=True) + "\n")


def print_answer(document: Any, text: Callable[[], str], *, as_json: bool) -> None:
    """Print a result: its document, or the text for people, which is made only then."""
    if as_json:
        print_json(document, indent=1)
    else:
        print_text(text())


def _write(text: str) -> None:
    """Write to stdout. An OSError names it: it may be a full disk."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        error.filename = "stdout"
        raise


def wants_json(flag: bool) -> bool:
    """Whether a result is printed as JSON: with `--json`, or for a program that reads stdout."""
    return flag or not sys.stdout.isatty()


def print_document(document: dict[str, Any], *, as_json: bool, indent: int | None = None) -> None:
    """Print a result: as JSON for programs, otherwise as lines with a name and a value."""
    if wants_json(as_json):
        print_json(document, indent)
        return
    width = max(map(len, document), default=0)
    for name, value in document.items():
        title, text = name.replace("_", " "), _plain_value(value)
        if isinstance(value, dict) and width + 2 + len(text) > _LINE:  # a line for each value
            print_text(title)
            inner = max(map(len, value))
            for key, part in value.items():
                print_text(f"  {key:<{inner}}  {_plain_value(part)}")
        else:
            print_text(f"{title:<{width}}  {text}")


def _plain_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 0.001 or not value else f"{value:.2g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain_value(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain_value, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def name_root(root: str) -> None:
    """Give the commands of `fit_commands` this root, as the user wrote it. "" if the user named none."""
    global _root
    _root = root


def name_key(path: str) -> None:
    """Give the commands of `fit_commands` this file of --sign. "" if the user named none."""
    global _key
    _key = path


def print_next(command: str) -> None:
    """Print the command that usually follows."""
    print_text(f"next: {fit_commands(command)}")


def fit_commands(text: str) -> str:
    """A message whose commands are those that the user would type: called in the same way, with the root at the end.

    Code below the command line writes `--root` with the whole path, or none. A command with another root keeps it.
    `--sign KEYFILE` names the file that the user named.
    """
    if _key:
        text = text.replace("--sign KEYFILE", f"--sign {storage.quote(_key)}")
    if "python -m jobs " not in text:
        return text
    flag = re.escape(f" --root {storage.quote(storage.normalize(_root or DEFAULT_ROOT))}")
    text = re.sub(rf"{flag}(?![^\s;,)`'\"])", "", text)
    ending = f" --root {storage.quote(storage.redact_credentials(_root))}" if _root else ""
    return _COMMAND.sub(lambda match: match[0] + ("" if _ROOT.search(match[0]) else ending),
                        text).replace("python -m jobs", PROGRAM)


def plain_log(text: str) -> str:
    """A piece of another process's log for stderr: without colors, other control characters as visible escapes."""
    return storage.escape_controls(_COLOR.sub("", text), LAYOUT)
