"""Rows of a source, and parts of it that bring their rows along."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.storage import name_by_content

_LEVELS = 64  # Arrow ends the process at some hundreds


@dataclass
class Row:
    """One row of a source: what its picture is called and where it is, and what is known of it."""

    number: int
    """Its place in the source; what is left out by a filter counts."""
    name: str
    """URL, name in the folder, or key in a tar."""
    caption: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    """Hash that the picture's bytes must have, in hexadecimal."""
    remarks: list[str] = field(default_factory=list)
    caption_file: str = ""
    json_file: str = ""
    """JSON beside the image, of which a worker takes the columns and, if there is no other, the caption."""
    missing: str = ""
    """Why there is no picture to be had, as far as the listing knows."""
    data: bytes | None = None


@dataclass(frozen=True)
class Part:
    """A piece of a source for one item: names and ranges, and the small files that hold lists."""

    inputs: dict[str, Any]
    carries: tuple[tuple[str, bytes], ...] = ()


@dataclass
class ReadReport:
    """What a worker learns while it reads a part."""

    filtered: int = 0
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, reason, detail) of what is no row: members of tars that nothing can be made of."""


def write_rows(rows: Iterable[Row], number: int, count: int, more: dict[str, Any] | None = None) -> Part:
    """A part that brings its rows along, as lines of JSON in a file beside the plan."""
    lines = "".join(json.dumps({key: value for key, value in vars(row).items() if value or key == "number"},
                               sort_keys=True) + "\n" for row in rows).encode()
    name = name_by_content(f"rows/{number:06d}.jsonl", lines)
    return Part({"rows": name, "count": count} | (more or {}), ((name, lines),))


def read_rows(stage_folder: str, inputs: dict[str, Any]) -> Iterator[Row]:
    """The rows that `listed` wrote."""
    for line in storage.read_bytes(storage.join(stage_folder, inputs["rows"])).splitlines():
        row = Row(**({"name": ""} | json.loads(line)))
        yield row


def parse_json_row(line: str) -> dict[str, Any]:
    """A line of JSON as a row; ValueError if it is no object, or nested too deep for Arrow and for Python's repr."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(f"a line with more than {_LEVELS} levels of brackets") from None
    if not isinstance(row, dict):
        raise ValueError("a line that is no JSON object")
    if line.count("[") + line.count("{") > _LEVELS and _has_level(row, _LEVELS):
        raise ValueError(f"a line with more than {_LEVELS} levels of brackets")
    return row


def _has_level(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_has_level(each, levels - 1) for each in (
        value.values() if isinstance(value, dict) else value))


def json_cell(value: Any) -> Any:
    """A cell as JSON can hold it, which has no infinity and no NaN."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, float) and (value != value or value in {float("inf"), float("-inf")}):
        return None
    return value if isinstance(value, int | float | bool | None) else replace_surrogates(str(value))


def replace_surrogates(string: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as in emoji that somebody cut, become question marks."""
    return string if string.isascii() else string.encode("utf-8", "replace").decode()


def json_cells(document: Mapping[str, Any]) -> dict[str, Any]:
    """Cells that are carried along, as JSON can hold them, without the best-known passwords in URLs."""
    usual = {replace_surrogates(name): json_cell(value) for name, value in document.items()}
    # No more than versions up to 0.1 took out: rows of their databases are compared by these cells.
    return {name: storage.redact_known_credentials(value) if isinstance(value, str) and "://" in value else value
            for name, value in usual.items()}


def redact_cells(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cells as they are stored: without credentials in URLs."""
    return {name: _redact_cell(value) if isinstance(value, str) and "//" in value else value
            for name, value in cells.items()}


def _redact_cell(text: str) -> str:
    return storage.redact_credentials(text) if " " in text.strip() else storage.redact_url(text)


def cell_text(value: Any) -> str:
    """A cell as one text: nothing is the empty text, of a list the first counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    usual = json_cell(value)
    return "" if usual is None else str(usual)
