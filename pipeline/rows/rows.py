"""Rows of a source, and parts of it that bring their rows along."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.storage import name_by_content
from pipeline.tables.cells import json_cell, replace_surrogates

LICENSE, NO_LICENSE, TAKEDOWN = "filtered_by_license", "filtered_without_license", "filtered_by_takedown"
BAD_ROW = "bad_row"
"""The reason of a row that cannot be read, and so has no columns that a filter could look at."""
NOT_IN_FOLDER = "named in the captions, not in the folder"
"""The words of the ledger for an image without a file."""

_SIGNS_OF_URLS = ("//", ":/", "\\")


@dataclass
class Row:
    """One row of a source: what its image is called and where it is, and what is known of it."""

    number: int
    """Its place in the source; what is left out by a filter counts."""
    name: str
    """URL, name in the folder, or key in a tar."""
    caption: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    """Its other cells: None, bool, int, float, str, bytes."""
    digest: str = ""
    """Hash that the image's bytes must have, in hexadecimal."""
    remarks: list[str] = field(default_factory=list)
    """Entries for the ledger: a reason, or `reason: detail`."""
    caption_file: str = ""
    later_caption_file: str = ""
    """The text that counts if the one in `caption_file` is empty."""
    json_file: str = ""
    """JSON beside the image, of which a worker takes the columns and, if there is no other, the caption."""
    missing: str = ""
    """Why there is no image to be had, as far as the listing knows."""
    data: bytes | None = None
    reason: str = ""
    """The reason in the ledger if there is no image; "": the usual one."""


    @property
    def more_files(self) -> list[str]:
        """The files beside the image that versions up to 0.1 did not read."""
        return [file for file in (self.later_caption_file, self.json_file) if file]


@dataclass(frozen=True)
class Part:
    """A piece of a source for one item: names and ranges, and the small files that hold lists."""

    inputs: dict[str, Any]
    carries: tuple[tuple[str, bytes], ...] = ()


@dataclass
class ReadReport:
    """Counts and remarks of a worker that reads a part."""

    filtered: int = 0
    filtered_by: Counter[str] = field(default_factory=Counter)
    """Rows that `--licenses` filtered, by LICENSE and NO_LICENSE; `filtered` has them too. TAKEDOWN: see `rebuild`."""
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, reason, detail) of members of tars that cannot be used as rows."""


def write_rows(rows: Iterable[Row], number: int, count: int, more: dict[str, Any] | None = None) -> Part:
    """A part that brings its rows along, as lines of JSON in a file beside the plan."""
    lines = "".join(f"{row_line(row)}\n" for row in rows).encode()
    name = name_by_content(f"rows/{number:06d}.jsonl", lines)
    return Part({"rows": name, "count": count} | (more or {}), ((name, lines),))


def read_rows(stage_folder: str, inputs: dict[str, Any]) -> Iterator[Row]:
    """The rows of a part that `write_rows` made."""
    return map(parse_row, storage.read_bytes(storage.file_below(stage_folder, inputs["rows"])).splitlines())


def row_line(row: Row) -> str:
    """A row as a line of JSON. Bytes of its image and among its columns become `{"base64": ...}`."""
    return json.dumps({key: value for key, value in vars(row).items() if value or key == "number"}, sort_keys=True,
                      default=_bytes_document)


def parse_row(line: bytes | str) -> Row:
    """The row of a line that `row_line` wrote."""
    row = Row(**({"name": ""} | json.loads(line)))
    if isinstance(row.data, dict):
        row.data = base64.b64decode(row.data["base64"])
    for name, cell in row.columns.items():
        if isinstance(cell, dict):
            row.columns[name] = base64.b64decode(cell["base64"])
    return row


def hashable_cells(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cells as JSON has them, for a hash."""
    return {name: _bytes_document(cell) if isinstance(cell, bytes) else cell for name, cell in cells.items()}


def _bytes_document(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"a row holds {type(value).__name__}")
    return {"base64": base64.b64encode(value).decode()}


def split_remark(remark: str) -> tuple[str, str]:
    """The reason and the detail of a remark."""
    reason, _, detail = remark.partition(": ")
    return reason, detail


def json_cells(document: Mapping[str, Any]) -> dict[str, Any]:
    """Cells that are carried along, as plain cells, without the best-known passwords in URLs."""
    cells = {}
    for name, value in document.items():
        cell = value if value is None or isinstance(value, int) else json_cell(value)
        if isinstance(cell, str) and "://" in cell:
            # No more than versions up to 0.1 took out: rows of their databases are compared by these cells.
            cell = storage.redact_known_credentials(cell)
        cells[name if name.isascii() else replace_surrogates(name)] = cell
    return cells


def redact_cells(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cells as they are stored: without credentials in URLs."""
    return {name: _redact_cell(value) if isinstance(value, str) and any(sign in value for sign in _SIGNS_OF_URLS)
            else value for name, value in cells.items()}


def _redact_cell(text: str) -> str:
    return storage.redact_urls(text) if " " in text.strip() else storage.redact_url(text)
