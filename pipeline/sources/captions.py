"""Tables of captions beside a folder of images."""

from __future__ import annotations

import logging
import posixpath
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.formats import parquet
from pipeline.layouts.column_paths import cell_at, find_roots
from pipeline.rows.column_names import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    find_caption_columns,
    find_columns,
    is_more_than_caption,
)
from pipeline.rows.rows import json_cells
from pipeline.sources.folder_files import METADATA_FILES, stem_of, usual_accents
from pipeline.tables.arrow_cells import is_nested, table_rows, text_columns
from pipeline.tables.cells import TableRow, cell_text, leave_out_long_texts
from pipeline.tables.delimited import check_delimiter
from pipeline.tables.names import is_parquet, table_kind
from pipeline.tables.text_tables import read_header, read_rows

_log = logging.getLogger(__name__)


@dataclass
class CaptionTables:
    """The rows of tables of captions, by the names of images in Unicode form NFC."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Columns of an image, and `caption` if its table has captions."""
    repeated: set[str] = field(default_factory=set)
    """Names that occur more than once: the first row of the deepest folder counts."""
    remarks: dict[str, list[str]] = field(default_factory=dict)
    """Entries for the ledger, by the names of images."""
    bad_rows: dict[str, TableRow] = field(default_factory=dict)
    """Rows that cannot be read, by file and row."""

    def add_table(self, address: str, folder: str, names: set[str], by_stem: dict[str, list[str]],
                  caption_column: str) -> None:
        """Add the rows of a table, whose file names are relative to `folder`."""
        for read in read_captions(address, caption_column):
            if read.problem:
                self.bad_rows[f"{folder}/{read.place}" if folder else read.place] = read
                continue
            row = read.cells
            name = _name_in_folder(row.pop("file"), folder, names)
            # wikiart.csv is next to the folder wikiart, and names may be relative to either.
            inside = f"{stem_of(address.rpartition('/')[2])}/{name}"
            name = inside if name not in names and inside in names else name
            # A name without a suffix stands for all images of that stem.
            for full in [name] if name in names else by_stem.get(name, [name]):
                if full in self.rows:
                    self.repeated.add(full)
                self.rows.setdefault(full, row)
                if read.remarks:
                    self.remarks.setdefault(full, []).extend(read.remarks)


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


def read_captions(address: str, caption_column: str) -> list[TableRow]:
    """The rows of a table: `file`, `caption` if there is such a column, and the other columns; and those not readable.

    Empty for an ImageFolder table that names no files. ValueError for a table that cannot be read, and for one
    without the columns that the settings or its name promise.
    """
    rows, header = read_caption_table(address)
    if not rows and not header:
        return []
    file_column = next(iter(find_columns(header, FILE_COLUMNS)), None)
    usual = next(iter(find_caption_columns(header)), None)
    caption = (caption_column if find_roots(caption_column, header) else None) if caption_column else usual
    is_metadata = address.rpartition("/")[2] in METADATA_FILES
    if is_metadata and file_column is None:
        _log.warning("%s is not used: no column names the images; it has %s", address, ", ".join(header))
        return []
    if file_column is None:
        check_delimiter(header, address)
        raise ValueError(f"{address} has the columns {', '.join(header)}, and none of them names the files\n"
                         f"hint: call that column {' or '.join(FILE_COLUMNS)}")
    if caption is None and (caption_column or not is_metadata):
        check_delimiter(header, address)
        raise ValueError(f"{address} has the columns {', '.join(header)}; wanted is one of "
                         f"{caption_column or ', '.join(CAPTION_COLUMNS)}\nhint: --caption-column NAME")
    if caption is None:
        _log.warning("%s: no column is a caption; it has %s\nhint: --caption-column NAME", address, ", ".join(header))
    left_out = {file_column} if caption and is_more_than_caption(caption) else {file_column, caption}
    others = [name for name in header if name not in left_out]
    # Arrow's widest integer of a mixed column has a sign: larger ones are kept as text, the whole column alike.
    large = {name for name in others if any(isinstance(cell := row.cells.get(name), int) and cell >= 1 << 63
                                            for row in rows)}
    for number, row in enumerate(rows, 1):
        if row.problem:
            continue
        cells = {name: str(cell) if name in large and (cell := row.cells.get(name)) is not None else row.cells.get(name)
                 for name in others}
        value = cell_at(row.cells, caption) if caption else None
        if caption in header and isinstance(value, list | dict):  # its first text is the caption, all is stored
            cells[caption] = value
        row.cells = (json_cells(cells)
                     | {"file": cell_text(row.cells.get(file_column)) or f"(row {number} of the captions)"}
                     | ({"caption": cell_text(value)} if caption else {}))
        row.remarks = [*row.remarks, *leave_out_long_texts(row.cells)]
    return rows


def read_caption_table(address: str) -> tuple[list[TableRow], list[str]]:
    """The rows and the column names of a table of captions; ValueError if it cannot be read."""
    try:
        if not is_parquet(address):
            rows = list(read_rows(address))
            header = list(dict.fromkeys(name for row in rows for name in row.cells))
            if rows and not header:
                raise ValueError(f"none of its {len(rows)} rows can be read: {rows[0].place}: {rows[0].problem}")
            if not rows and table_kind(address) in {"csv", "tsv"}:
                header = read_header(address)
            return rows, header
        table = parquet.read(storage.read_bytes(address))
        whole = [name for name in find_caption_columns(table.column_names) if is_nested(table.schema.field(name).type)]
        rows = table_rows(table, text_columns(table), whole)
        return rows, list(rows[0].cells) if rows else table.column_names
    except FileNotFoundError:
        raise ValueError(f"the captions file {address} does not exist") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{address} cannot be read as captions: {str(error).strip()}\n"
                         f"hint: a parquet file, a CSV in UTF-8 with a header, or lines of JSON objects") from None
