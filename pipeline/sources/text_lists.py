"""Lists in CSV, TSV, JSON or lines of URLs. Workers cannot start in the middle of such files.

So the driver reads them once and writes each item's rows beside the plan.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.layouts.known import headless_columns
from pipeline.rows.column_names import find_columns
from pipeline.rows.column_types import ColumnTypes
from pipeline.rows.rows import Part, ReadReport, Row, read_rows, write_rows
from pipeline.sources.list_columns import IMAGE_COLUMNS, URL_COLUMNS, Columns, make_row, text_candidates
from pipeline.sources.lists import ListSource
from pipeline.tables.cells import TableRow, cell_text
from pipeline.tables.delimited import check_delimiter
from pipeline.tables.image_cells import text_kind
from pipeline.tables.names import table_kind
from pipeline.tables.text_tables import read_first_cells, read_header
from pipeline.tables.text_tables import read_rows as read_table

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)
_BATCH = 1024


class TextLists(ListSource):
    """Rows of text files."""

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        self._headless: dict[str, tuple[str, ...]] = {}
        super().__init__(config, addresses)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_headless": {}}

    def _add_types(self, types: ColumnTypes) -> Iterator[Columns]:
        for address in self.addresses:
            for batch, columns in self._batches_with_columns(address):
                for row in batch:
                    types.add_row({name: cell for name, cell in row.cells.items()
                                   if name not in columns.not_stored or isinstance(cell, list | dict)})
                yield columns
                # All cells of these are text, so one row tells the types.
                if not _may_grow(address, batch) and any(row.cells for row in batch):
                    break

    def parts(self) -> Iterator[Part]:
        need, number, position, filtered = self.config.rows_per_shard, 0, 0, 0
        chosen: list[Row] = []
        has_caption = self.config.caption_column in {"", *self.columns.others}
        for address in self.addresses:
            before = position
            for batch, columns in self._batches_with_columns(address):
                for read, passes in zip(batch, self._mask(batch), strict=True):
                    if not passes:
                        filtered += 1
                    else:
                        if len(chosen) == need:
                            yield write_rows(chosen, number, need, {"filtered": filtered})
                            chosen, number, filtered = [], number + 1, 0
                        chosen.append(make_row(position, read, columns))
                        has_caption = has_caption or bool(chosen[-1].caption)
                    position += 1
            if position == before:
                _log.warning("%s holds no rows", address)
        if chosen and not has_caption:
            raise ValueError(f"{self.addresses[0]}: none of {position} rows has a text at {self.config.caption_column} "
                             f"(caption_column)\nhint: the columns are {', '.join(self.columns.others)}")
        if chosen:
            yield write_rows(chosen, number, len(chosen), {"filtered": filtered})
        elif position:
            raise ValueError(f"{self.addresses[0]}: not one of {position} rows passes the filter {self.config.where}")

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        return read_rows(stage_folder, inputs)

    def _summaries(self) -> list[str]:
        return [json.dumps([address.rsplit("/", 1)[-1], storage.sha256(address)]) for address in self.addresses]

    def _first_columns(self) -> Columns:
        for address in self.addresses:
            if (found := self._look_for_columns(address, None)) is None:
                continue
            columns, schema = found
            if not columns.caption:
                columns = replace(columns, caption=self._later_caption(columns))
            if self.where:
                missing = [pa.field(name, pa.null()) for name in self.where.columns if name not in schema.names
                           and self._other_file_has(name)]
                try:
                    self.where.check(self.where.cast(pa.schema([*schema, *missing]).empty_table()).schema)
                except ValueError as error:
                    raise ValueError(f"{address}: {error}") from error
            return columns
        raise ValueError(f"{self.addresses[0]} holds no rows")

    def _look_for_columns(self, address: str, first: Columns | None) -> tuple[Columns, pa.Schema] | None:
        """The columns of a file and what its rows have, None without rows.

        The first rows decide. In JSON, the search continues for a caption and for the columns that settings name.
        """
        schema, columns, problem = pa.schema([]), None, None
        for batch in self._batches(address):
            schema = _merge_schemas(schema, _schema(batch))
            for name in text_candidates(schema):
                text = next((cell for row in batch if isinstance(cell := row.cells.get(name), str) and cell), "")
                self.text_kinds |= {name: kind} if (kind := text_kind(text)) else {}
            try:
                columns = self._choose_columns(schema, address, first)
            except ValueError as error:
                problem = error
            is_complete = columns and columns.caption and set(self.where.columns if self.where else ()) <= {
                *schema.names}
            if is_complete or not _may_grow(address, batch):
                break
        if columns is None and problem:
            raise problem
        return (columns, schema) if columns else None

    def _later_caption(self, first: Columns) -> str:
        """The caption column of the first of the later files that has one."""
        columns = (self._look_for_columns(address, first) for address in self.addresses[1:])
        return next((each[0].caption for each in columns if each and each[0].caption), "")

    def _other_file_has(self, name: str) -> bool:
        return any(name in row.cells for address in self.addresses[1:] for row in next(self._batches(address), []))

    def _batches_with_columns(self, address: str) -> Iterator[tuple[list[TableRow], Columns]]:
        """The rows of a file and what its columns are. Objects of JSON may have other names in later rows."""
        schema, columns = pa.schema([]), None
        known: dict[str, None] = {}
        for batch in self._batches(address):
            if columns is None or (_may_grow(address, batch) and any(row.cells.keys() - known.keys() for row in batch)):
                schema = _merge_schemas(schema, _schema(batch))
                known = dict.fromkeys(schema.names)
                try:
                    columns = self._choose_columns(schema, address, self.columns, columns)
                except ValueError:
                    found = None if columns else self._look_for_columns(address, self.columns)
                    columns = found[0] if found else columns
                    assert columns
            yield batch, columns

    def _batches(self, address: str) -> Iterator[list[TableRow]]:
        """The rows of a file, with the cells that its folders add; ValueError if none of the first can be read."""
        partition, checked = self._partition_cells(address), False
        names = self.config.column_names or self._known_columns(address)
        for batch in _in_batches(read_table(address, names)):
            if not checked:
                _check_batch(batch, address)
                checked = True
            if partition:
                for row in batch:
                    row.cells = row.cells and partition | row.cells
            yield batch

    def _known_columns(self, address: str) -> tuple[str, ...]:
        """The columns of a file without a header, if it is of a known layout."""
        if table_kind(address) != "tsv":
            return ()
        if address not in self._headless:
            first = read_first_cells(address)
            is_header = find_columns(first, (*URL_COLUMNS, *IMAGE_COLUMNS))
            self._headless[address] = () if is_header else headless_columns(first)
            if self._headless[address] and len(self._headless) == 1:
                _log.info("%s looks like %s, which has no header; its columns are %s", address,
                          "CC3M" if self._headless[address][0] == "caption" else "CC12M",
                          ", ".join(self._headless[address]))
        return self._headless[address]

    def _mask(self, batch: list[TableRow]) -> np.ndarray:
        """Whether rows pass the filter; rows that cannot be read do, to be counted as such."""
        if self.where is None:
            return np.ones(len(batch), bool)
        unreadable = np.array([bool(row.problem) for row in batch])
        return unreadable | self.where.mask(self.where.cast(_table(batch, self.where.columns)))


def _check_batch(batch: Sequence[TableRow], address: str) -> None:
    """Refuse a file whose first rows are no rows, or whose lines are no URLs."""
    if all(row.problem for row in batch):
        if table_kind(address) in {"csv", "tsv"}:
            check_delimiter(read_header(address), address)
        raise ValueError(f"{address}: none of the first {len(batch)} rows can be read, {batch[0].place}: "
                         f"{batch[0].problem}\n"
                         f"hint: a .csv has commas, a .tsv has tabs, a .jsonl has an object in each line")
    urls = [row.cells["url"] for row in batch if list(row.cells) == ["url"]] if table_kind(address) == "txt" else []
    if 2 * sum("\t" in url for url in urls) > len(batch):
        raise ValueError(f"{address} has tabs in its lines, as {urls[0][:200]!r}\n"
                         f"hint: --columns url,caption names the columns, in their order")
    if table_kind(address) == "txt" and all(
            list(row.cells) == ["url"] and "//" not in row.cells["url"] and not row.cells["url"].startswith("data:")
            for row in batch):
        raise ValueError(f"{address} has no URL in its first {len(batch)} lines\n"
                         f"hint: a .txt list has a URL in each line; --columns names the columns of one with tabs")


def _may_grow(address: str, batch: Sequence[TableRow]) -> bool:
    """Whether later rows of a file may have columns that those of a batch do not have, as in JSON."""
    kind = table_kind(address)
    return kind not in {"csv", "tsv"} and not (kind == "txt" and all(row.cells.keys() <= {"url"} for row in batch))


def _merge_schemas(first: pa.Schema, more: pa.Schema) -> pa.Schema:
    """The columns of both. The first type of a column that is not null counts."""
    types = {field.name: field for field in more} | {field.name: field for field in first
                                                     if not pa.types.is_null(field.type)}
    return pa.schema([types[name] for name in dict.fromkeys([*first.names, *more.names])])


def _schema(batch: Sequence[TableRow]) -> pa.Schema:
    return _table(batch, list(dict.fromkeys(name for row in batch for name in row.cells))).schema


def _table(batch: Sequence[TableRow], names: Sequence[str]) -> pa.Table:
    """Some columns of rows, for a filter."""
    columns = {}
    for name in names:
        cells = [row.cells.get(name) for row in batch]
        try:
            columns[name] = pa.array(cells)
        # Cells of several types, numbers too large, halves of characters.
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            columns[name] = pa.array([None if cell is None else cell_text(cell) for cell in cells], pa.string())
    return pa.table(columns)


def _in_batches(rows: Iterable[TableRow]) -> Iterator[list[TableRow]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
