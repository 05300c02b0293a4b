"""Lists of addresses in parquet, CSV or JSON lines, and parquet tables that hold the pictures themselves.

Parquet stays where it is: the driver reads the footers (and, for a filter, the columns it names), an item is a
range of rows, and a worker reads the row groups that its range touches. Lists of text cannot be entered in the
middle, so the driver reads them once and writes each item's rows beside the plan.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.sources.column_names import find_caption_columns, is_more_than_caption
from pipeline.sources.column_types import ColumnTypes
from pipeline.sources.rows import (
    Part,
    ReadReport,
    Row,
    cell_text,
    json_cells,
    read_rows,
    write_rows,
)
from pipeline.sources.source import Source, parse_row_filter
from pipeline.sources.text_lists import read_text_rows, text_list_ending
from pipeline.storage import name_by_content, parquet

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes")
HASH_COLUMNS = ("original_sha256", "sha256", "md5")
_DIGITS = (32, 40, 64, 128)  # of md5, sha1, sha256 and sha512 in hexadecimal
_HASH = re.compile("[0-9a-fA-F]*")
_BATCH = 1024


@dataclass(frozen=True)
class Columns:
    """Which column of a list is what."""

    image: str
    kind: Literal["url", "bytes"]
    caption: str
    digest: str


class ListSource(Source):
    """Rows of tables."""

    kind = "list"

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        super().__init__(config)
        self.addresses = addresses
        self.where = parse_row_filter(config)
        texts = {address for address in addresses if not _is_parquet(address)}
        if texts and len(texts) < len(addresses):
            raise ValueError("parquet and text lists in one source\nhint: make a dataset of each")
        self.texts = bool(texts)
        self.columns = self._columns()
        self.fetch = "url" if self.columns.kind == "url" else "none"

    def identity(self) -> str:
        if self.texts:
            summaries = [json.dumps([address.rsplit("/", 1)[-1], storage.sha256(address)])
                         for address in self.addresses]
        else:
            summaries = storage.map_urls(lambda url: json.dumps(storage.summarize_file(url)), self.addresses)
        return hashlib.sha256("\n".join(summaries).encode()).hexdigest()

    def column_types(self) -> dict[str, str]:
        types = ColumnTypes()
        if not self.texts:
            for schema in storage.map_urls(_read_schema, self.addresses):
                types.add_schema(schema)
        for address in self.addresses if self.texts else ():
            rows = read_text_rows(address)
            # Of a CSV every cell is text.
            for cells in itertools.islice(rows, 1 if text_list_ending(address) in {"csv", "tsv"} else None):
                types.add_row(cells)
        return {name: kind for name, kind in types.by_column().items()
                if name != self.columns.image and (name != self.columns.caption or is_more_than_caption(name))}

    def parts(self) -> Iterator[Part]:
        return self._text_parts() if self.texts else self._parquet_parts()

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        if self.texts:
            yield from read_rows(stage_folder, inputs)
            return
        only = (set(json.loads(storage.read_bytes(storage.join(stage_folder, inputs["only"]))))
                if "only" in inputs else None)
        for address, first, start, stop in inputs["spans"]:
            with _open_parquet(address) as file:
                for position, cells in self._read_span(file, start, stop):
                    if only is None or first + position in only:
                        yield self._row(first + position, cells)

    def retry_part(self, stage_folder: str, wanted: list[tuple[dict[str, Any], list[int]]], number: int) -> Part:
        if self.texts:
            return super().retry_part(stage_folder, wanted, number)
        numbers = [number for _, chosen in wanted for number in chosen]
        data = json.dumps(numbers).encode()
        name = name_by_content(f"rows/{number:06d}.json", data)
        return Part({"spans": [span for inputs, _ in wanted for span in inputs["spans"]], "only": name},
                    ((name, data),))

    def _columns(self) -> Columns:
        first = self.addresses[0]
        if not self.texts:
            schema = _read_schema(first)
        else:
            # An object of JSON need not have every column, and of many files one may be empty.
            batches = (next(_batch_rows(read_text_rows(address)), []) for address in self.addresses)
            rows = next((rows for rows in batches if rows), [])
            if not rows:
                raise ValueError(f"{first} holds no rows")
            schema = _table(rows, list(dict.fromkeys(name for row in rows for name in row))).schema
        columns = self._choose_columns(schema, first)
        if self.where:
            try:
                self.where.check(self.where.cast(schema.empty_table()).schema if self.texts else schema)
            except ValueError as error:
                raise ValueError(f"{first}: {error}") from error
        return columns

    def _choose_columns(self, schema: pa.Schema, address: str) -> Columns:
        """Which column is what, by the settings or the names that are usual."""
        names, config = schema.names, self.config
        for setting in ("url_column", "image_column", "caption_column", "hash_column"):
            wanted = getattr(config, setting)
            if wanted and wanted not in names and not (setting == "hash_column" and wanted == "none"):
                raise ValueError(f"{address} has no column {wanted} ({setting})\nhint: it has {', '.join(names)}")
        image = config.image_column or next(
            (name for name in IMAGE_COLUMNS if name in names and _is_bytes_type(schema.field(name).type)), None)
        # What is here need not be fetched.
        url = config.url_column or (None if image else next((name for name in URL_COLUMNS if name in names), None))
        column = url or image
        if column is None:
            raise ValueError(f"{address} has the columns {', '.join(names)}; wanted is one of "
                             f"{', '.join(URL_COLUMNS)}, or pictures as bytes\n"
                             f"hint: --url-column, or --image-column for one with bytes")
        if url is None and not _is_bytes_type(schema.field(image).type):
            raise ValueError(f"{address}: the column {image} holds {schema.field(image).type}, not bytes of pictures")
        digest = config.hash_column or next((name for name in HASH_COLUMNS if name in names), "")
        return Columns(column, "url" if url else "bytes",
                       config.caption_column or next(iter(find_caption_columns(names)), ""),
                       "" if digest == "none" else digest)

    def _row(self, number: int, cells: dict[str, Any]) -> Row:
        columns = self.columns
        cell = cells.pop(columns.image, None)
        caption = cell_text(cells.get(columns.caption)) if columns.caption else ""
        if not is_more_than_caption(columns.caption):
            cells.pop(columns.caption, None)
        digest, remarks = _parse_digest(cells.get(columns.digest)) if columns.digest else ("", [])
        row = Row(number, "", caption, json_cells(cells), digest, remarks)
        if columns.kind == "url":
            row.name = cell_text(cell).strip()
            row.missing = "" if row.name else "the list has no address here"
            return row
        if isinstance(cell, dict):
            row.name, cell = cell.get("path") or "", cell.get("bytes")
        row.name = row.name or cell_text(cells.get("url") or cells.get("key") or cells.get("id")) or f"row {number}"
        row.data, row.missing = cell, "" if cell is not None else "the table has no bytes here"
        return row

    # Parquet: ranges of rows.

    def _parquet_parts(self) -> Iterator[Part]:
        need, first = self.config.rows_per_shard, 0
        spans: list[list[Any]] = []
        chosen = 0
        for address in self.addresses:
            with _open_parquet(address) as file:
                self._check_columns(file, address)
                total, start = file.metadata.num_rows, 0
                # A part is closed by the first row that it has no room for: what a filter leaves out
                # between two parts belongs to the earlier.
                for position, passing in self._filter_groups(file):
                    while chosen + len(passing) > need:
                        cut = position + int(passing[need - chosen])
                        spans.append([address, first, start, cut])
                        yield self._part(spans, need)
                        passing, chosen, spans, start = passing[need - chosen:], 0, [], cut
                    chosen += len(passing)
                if start < total:
                    spans.append([address, first, start, total])
                first += total
        if chosen:
            yield self._part(spans, chosen)
        elif first:
            raise ValueError(f"{self.addresses[0]}: not one of {first} rows passes the filter {self.config.where}")

    def _part(self, spans: list[list[Any]], chosen: int) -> Part:
        spans = [span for span in spans if span[2] < span[3]]
        return Part({"spans": spans, "count": chosen,
                     "filtered": sum(stop - start for _, _, start, stop in spans) - chosen})

    def _check_columns(self, file: pq.ParquetFile, address: str) -> None:
        """The files of a list must have the same columns, as far as they are used."""
        names = file.schema_arrow.names
        used = {self.columns.image, *([self.columns.caption] if self.columns.caption else ()),
                *(self.where.columns if self.where else ())}
        if missing := used - set(names):
            raise ValueError(f"{address} has no column {', '.join(sorted(missing))}, which {self.addresses[0]} has\n"
                             f"hint: make a dataset of each, or name the columns")

    def _filter_groups(self, file: pq.ParquetFile) -> Iterator[tuple[int, np.ndarray]]:
        """(position, numbers from there on) of rows that pass the filter, batch by batch."""
        position = 0
        if self.where is None:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                for begin in range(0, count, 1 << 20):
                    yield position + begin, np.arange(min(1 << 20, count - begin))
                position += count
            return
        row_groups = set(self.where.row_groups(file))
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if group in row_groups:
                begin = position
                for batch in file.iter_batches(1 << 16, row_groups=[group], columns=list(self.where.columns),
                                              use_threads=False):
                    yield begin, np.flatnonzero(self.where.mask(pa.Table.from_batches([batch])))
                    begin += batch.num_rows
            position += count

    def _read_span(self, file: pq.ParquetFile, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, cells) of the rows of a file between start and stop that pass the filter."""
        position = 0
        row_groups = set(self.where.row_groups(file)) if self.where else None
        size = 64 if self.columns.kind == "bytes" else _BATCH
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if position < stop and position + count > start and (row_groups is None or group in row_groups):
                begin = position
                for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
                    low, high = max(start - begin, 0), min(stop - begin, batch.num_rows)
                    if low < high:
                        table = pa.Table.from_batches([batch]).slice(low, high - low)
                        chosen = (np.flatnonzero(self.where.mask(table)) if self.where else
                                  np.arange(table.num_rows))
                        table = table.take(pa.array(chosen)) if len(chosen) < table.num_rows else table
                        table = _unsigned_to_text(table)
                        rows = parquet.rows(table)
                        yield from ((begin + low + int(number), cells)
                                    for number, cells in zip(chosen, rows, strict=True))
                    begin += batch.num_rows
                    if begin >= stop:
                        return
            position += count

    # Lists of text: rows beside the plan.

    def _text_parts(self) -> Iterator[Part]:
        need, number, position = self.config.rows_per_shard, 0, 0
        chosen: list[Row] = []
        filtered = 0
        for address in self.addresses:
            for batch in _batch_rows(read_text_rows(address)):
                passing = self._text_mask(batch)
                for cells, passes in zip(batch, passing, strict=True):
                    if not passes:
                        filtered += 1
                    else:
                        if len(chosen) == need:
                            yield write_rows(chosen, number, need, {"filtered": filtered})
                            chosen, number, filtered = [], number + 1, 0
                        chosen.append(self._row(position, cells))
                    position += 1
        if chosen:
            yield write_rows(chosen, number, len(chosen), {"filtered": filtered})
        elif position:
            raise ValueError(f"{self.addresses[0]}: not one of {position} rows passes the filter {self.config.where}")

    def _text_mask(self, batch: list[dict[str, Any]]) -> np.ndarray:
        if self.where is None:
            return np.ones(len(batch), bool)
        return self.where.mask(self.where.cast(_table(batch, self.where.columns)))


def _is_parquet(address: str) -> bool:
    return address.lower().endswith((".parquet", ".pq"))


def _table(rows: list[dict[str, Any]], names: Sequence[str]) -> pa.Table:
    """Some columns of rows of text, to be looked at by a filter."""
    columns = {}
    for name in names:
        cells = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(cells)
        # Cells of several types, numbers too large, halves of characters.
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            columns[name] = pa.array([None if cell is None else cell_text(cell) for cell in cells], pa.string())
    return pa.table(columns)


def _is_bytes_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parse_digest(cell: Any) -> tuple[str, list[str]]:
    """A hash in hexadecimal, "" if there is none; and what there is to remark."""
    hexadecimal = cell_text(cell).strip()
    if len(hexadecimal) in _DIGITS and _HASH.fullmatch(hexadecimal):
        return hexadecimal.lower(), []
    if isinstance(cell, bytes) and 2 * len(cell) in _DIGITS:
        return cell.hex(), []
    return "", ["hash_unreadable"] if hexadecimal else []


def _unsigned_to_text(table: pa.Table) -> pa.Table:
    """Numbers that only fit without a sign as texts: mixed with others, Arrow has no type for them."""
    for number, field in enumerate(table.schema):
        if field.type == pa.uint64():
            table = table.set_column(number, field.name, table.column(number).cast(pa.string()))
    return table


@contextmanager
def _open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_reader(address) as stream:
            try:
                # Buffered, or a row group would be read whole however small the batches are.
                yield pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            except OSError as error:
                if error.errno is not None or isinstance(error, storage.StorageError):
                    raise
                raise pa.ArrowInvalid(str(error)) from error  # damaged pages, and not the disk
    except pa.ArrowException as error:
        raise ValueError(f"{address} cannot be read as parquet: {str(error).strip()}") from None


def _read_schema(address: str) -> pa.Schema:
    with _open_parquet(address) as file:
        return file.schema_arrow


def _batch_rows(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
