"""Tables of captions beside a folder of images."""

from __future__ import annotations

import csv
import io
import logging
import posixpath
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.sources.column_names import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    find_caption_columns,
    find_columns,
    is_more_than_caption,
)
from pipeline.sources.folder_files import METADATA_FILES, stem_of, usual_accents
from pipeline.sources.rows import cell_text, json_cells, parse_json_row
from pipeline.storage import parquet

_log = logging.getLogger(__name__)


@dataclass
class CaptionTables:
    """What tables say of images, by the names of these with usual accents."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Columns of an image, and `caption` if its table has captions."""
    repeated: set[str] = field(default_factory=set)
    """Names that occur more than once: the first row of the deepest folder counts."""

    def add_table(self, address: str, folder: str, names: set[str], by_stem: dict[str, list[str]],
                  caption_column: str) -> None:
        """Add the rows of a table, whose file names are relative to `folder`."""
        for row in read_captions(address, caption_column):
            name = _name_in_folder(row.pop("file"), folder, names)
            # A name without a suffix stands for all images of that stem.
            for full in [name] if name in names else by_stem.get(name, [name]):
                if full in self.rows:
                    self.repeated.add(full)
                self.rows.setdefault(full, row)


def names_by_stem(names: set[str]) -> dict[str, list[str]]:
    """Names of images by their names without a suffix."""
    by_stem: dict[str, list[str]] = {}
    for name in sorted(names):
        by_stem.setdefault(stem_of(name), []).append(name)
    return by_stem


def _name_in_folder(name: str, folder: str, names: set[str]) -> str:
    """The name of an image below the source, as a table in one of its folders has it."""
    name = usual_accents(name.removeprefix("./"))
    if folder:
        name = f"{folder}/{name}"
        inside = posixpath.normpath(name)
        name = name if inside.startswith("../") else inside
    return slashed if name not in names and (slashed := name.replace("\\", "/")) in names else name


def read_captions(address: str, caption_column: str) -> list[dict[str, Any]]:
    """The rows of a table: `file`, `caption` if there is such a column, and the other columns.

    Empty for an ImageFolder table that names no files. ValueError for a table that cannot be read, and for one
    without the columns that the settings or its name promise.
    """
    rows, header = _read_table(address)
    if not rows and not header:
        return []
    file_column = next(iter(find_columns(header, FILE_COLUMNS)), None)
    wanted = [caption_column] if caption_column else find_caption_columns(header)
    caption = next((name for name in wanted if name in header), None)
    is_metadata = address.rpartition("/")[2] in METADATA_FILES
    if is_metadata and file_column is None:
        _log.warning("%s is not used: no column names the images; it has %s", address, ", ".join(header))
        return []
    if file_column is None or (caption is None and (caption_column or not is_metadata)):
        raise ValueError(f"{address} has the columns {', '.join(header)}; wanted are one of {', '.join(FILE_COLUMNS)} "
                         f"and one of {caption_column or ', '.join(CAPTION_COLUMNS)}\n"
                         f"hint: --caption-column NAME")
    if caption is None:
        _log.warning("%s: no column is a caption; it has %s\nhint: --caption-column NAME", address, ", ".join(header))
    left_out = {file_column} if caption and is_more_than_caption(caption) else {file_column, caption}
    others = [name for name in header if name not in left_out]
    # Arrow's widest integer of a mixed column has a sign: larger ones are kept as text, the whole column alike.
    large = {name for name in others if any(isinstance(row[name], int) and row[name] >= 1 << 63 for row in rows)}
    return [json_cells({name: str(row[name]) if name in large and row[name] is not None else row[name]
                      for name in others})
            | {"file": cell_text(row[file_column]) or f"(row {number} of the captions)"}
            | ({"caption": cell_text(row[caption])} if caption else {})
            for number, row in enumerate(rows, 1)]


def _read_table(address: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows and the column names of a table of captions."""
    try:
        data = storage.read_bytes(address)
    except FileNotFoundError:
        raise ValueError(f"the captions file {address} does not exist") from None
    try:
        if address.endswith((".parquet", ".pq")):
            table = parquet.read(data)
            return parquet.rows(table), table.column_names
        if address.endswith((".jsonl", ".ndjson")):
            rows = [parse_json_row(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
            header = list(dict.fromkeys(name for row in rows for name in row))
            return [dict.fromkeys(header) | row for row in rows], header
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        return [{name: row[name] for name in row if name is not None} for row in reader], list(reader.fieldnames or [])
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{address} cannot be read as captions: {str(error).strip()}\n"
                         f"hint: a parquet file, a CSV in UTF-8 with a header, or lines of JSON objects") from None
