"""Lists and tables in parquet.

The files stay where they are. The driver reads the footers and, for a filter, the columns it names. An item is a range
of rows, and a worker reads the row groups that its range touches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.layouts.column_paths import find_dead_path
from pipeline.rows.column_types import ColumnTypes
from pipeline.rows.rows import Part, ReadReport, Row, split_remark
from pipeline.sources.list_columns import Columns, make_row, text_candidates
from pipeline.sources.lists import ListSource
from pipeline.storage import name_by_content
from pipeline.tables.arrow_cells import as_utf8, kind_of_type, plain_cells, stored_columns, table_rows
from pipeline.tables.cells import TableRow, decode_bytes
from pipeline.tables.class_labels import class_features, name_classes
from pipeline.tables.image_cells import text_kind
from pipeline.tables.large_pages import group_batches
from pipeline.tables.parquet_tables import open_parquet, read_schema

_ROWS_AT_ONCE = {"url": 1024, "bytes": 64}
_SAMPLE_ROWS = 64  # that tell whether a column of bytes is text


class ParquetLists(ListSource):
    """Rows of parquet files."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_schemas": {}}

    def _add_types(self, types: ColumnTypes) -> Iterator[Columns]:
        for address, schema in self._distinct_schemas():
            columns = self._choose_columns(schema, address, self.columns)
            named = name_classes(schema.empty_table(), class_features(schema))[0].schema
            types.add_schema(named, columns.not_stored, self._text_columns)
            yield columns

    def parts(self) -> Iterator[Part]:
        need, first = self.config.rows_per_shard, 0
        spans: list[list[Any]] = []
        chosen = 0
        for address in self.addresses:
            with open_parquet(address) as file:
                total, start = file.metadata.num_rows, 0
                # A part is closed by the first row that it has no room for: what a filter leaves out
                # between two parts belongs to the earlier.
                for position, passing in self._filter_groups(file, address):
                    while chosen + len(passing) > need:
                        cut = position + int(passing[need - chosen])
                        spans.append([address, first, start, cut])
                        yield _part(spans, need)
                        passing, chosen, spans, start = passing[need - chosen:], 0, [], cut
                    chosen += len(passing)
                if start < total:
                    spans.append([address, first, start, total])
                first += total
        if chosen:
            yield _part(spans, chosen)
        elif first:
            raise ValueError(f"{self.addresses[0]}: not one of {first} rows passes the filter {self.config.where}")

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        only = (set(json.loads(storage.read_bytes(storage.file_below(stage_folder, inputs["only"]))))
                if "only" in inputs else None)
        for address, first, start, stop in inputs["spans"]:
            with open_parquet(address) as file:
                columns = self._choose_columns(file.schema_arrow, address, self.columns)
                if start == 0:
                    name = address.rsplit("/", 1)[-1]
                    repeated = stored_columns(file.schema_arrow)[1]
                    reading.remarks += [(name, *split_remark(remark)) for remark in repeated]
                for position, read in self._read_span(file, address, columns, start, stop, str(scratch)):
                    if only is None or first + position in only:
                        yield make_row(first + position, read, columns)

    def retry_part(self, stage_folder: str, wanted: list[tuple[dict[str, Any], list[int]]], number: int) -> Part:
        numbers = [number for _, chosen in wanted for number in chosen]
        data = json.dumps(numbers).encode()
        name = name_by_content(f"rows/{number:06d}.json", data)
        return Part({"spans": [span for inputs, _ in wanted for span in inputs["spans"]], "only": name},
                    ((name, data),))

    def _summaries(self) -> list[str]:
        return storage.map_urls(lambda url: json.dumps(storage.summarize_file(url)), self.addresses)

    def _first_columns(self) -> Columns:
        equal: dict[pa.Schema, pa.Schema] = {}  # many files share a schema, and it may be large
        self._schemas = {address: equal.setdefault(schema, schema) for address, schema in
                         zip(self.addresses, storage.map_urls(read_schema, self.addresses), strict=True)}
        for address, schema in self._distinct_schemas():
            self._find_text_kinds(address, schema)
        columns = self._choose_columns(self._schemas[self.addresses[0]], self.addresses[0])
        self._check_paths()
        captions = []
        for address, schema in self._distinct_schemas():
            captions.append(self._choose_columns(schema, address, columns).caption)
            if self.where:
                try:
                    self.where.check(self._for_filter(schema.empty_table(), address).schema)
                except ValueError as error:
                    raise ValueError(f"{address}: {error}") from error
        columns = replace(columns, caption=columns.caption or next(filter(None, captions), ""))
        self._text_columns = self._find_text_columns(columns)
        return columns

    def _check_paths(self) -> None:
        """ValueError if a setting has a path that no file of the list can have."""
        for setting in ("url_column", "caption_column"):
            dead = [find_dead_path(getattr(self.config, setting), dict(zip(schema.names, schema.types, strict=True)))
                    for _, schema in self._distinct_schemas()]
            if all(dead):
                fields = ", ".join(f"{field.name} ({field.type})" for field in self._schemas[self.addresses[0]])
                raise ValueError(f"{self.addresses[0]} has no field {dead[0]} ({setting})\nhint: it has {fields}")

    def _distinct_schemas(self) -> list[tuple[str, pa.Schema]]:
        """Each schema of the files, and the first file that has it."""
        found: dict[pa.Schema, str] = {}
        for address, schema in self._schemas.items():
            found.setdefault(schema, address)
        return [(address, schema) for schema, address in found.items()]

    def _find_text_kinds(self, address: str, schema: pa.Schema) -> None:
        """Look at the first cells of text columns that are named as images."""
        if not (names := [name for name in text_candidates(schema) if name not in self.text_kinds]):
            return
        with open_parquet(address) as file:
            batch = next(file.iter_batches(_SAMPLE_ROWS, columns=names, use_threads=False), None)
        if batch is not None:
            table = pa.Table.from_batches([batch])
            for name in names:
                text = next(filter(None, plain_cells(table[name])[0]), "")
                self.text_kinds |= {name: kind} if (kind := text_kind(text)) else {}

    def _find_text_columns(self, first: Columns) -> frozenset[str]:
        """The columns of bytes whose first cells are text. URLs and captions are text in any case."""
        is_text: dict[str, bool] = {}
        texts = set()
        for address, schema in self._distinct_schemas():
            columns = self._choose_columns(schema, address, first)
            texts |= {columns.caption} | ({columns.image} if columns.kind == "url" else set())
            unknown = [column for column in stored_columns(schema, columns.whole)[0] if not column.field
                       and kind_of_type(column.type) == "bytes" and column.name not in {*is_text, *columns.whole}]
            if not unknown:
                continue
            with open_parquet(address) as file:
                names = list(dict.fromkeys(schema.names[column.position] for column in unknown))
                batch = next(file.iter_batches(_SAMPLE_ROWS, columns=names, use_threads=False), None)
            if batch is None:
                continue
            for column in unknown:
                position = batch.schema.names.index(schema.names[column.position])
                cells = plain_cells(pa.chunked_array([batch.column(position)]), as_bytes=True)[0]
                if any(cell is not None for cell in cells):
                    is_text[column.name] = all(cell is None or isinstance(decode_bytes(cell), str) for cell in cells)
        return frozenset(texts | {name for name, text in is_text.items() if text})

    # A filter may name columns of the file, of its folders, and of other files.

    def _for_filter(self, table: pa.Table, address: str) -> Any:
        """A table with the columns that the filter names; those that only other files have are null."""
        assert self.where
        partition = self._partition_cells(address)
        for name in self.where.columns:
            if name in table.column_names:
                continue
            if name in partition:
                cells = pa.array([partition[name]] * table.num_rows, self._partition_type(name))
                table = table.append_column(name, cells)
            elif not self._schemas or any(name in schema.names for _, schema in self._distinct_schemas()):
                table = table.append_column(name, pa.nulls(table.num_rows))
        return as_utf8(table, self.where.columns)

    def _filter_groups(self, file: pq.ParquetFile, address: str) -> Iterator[tuple[int, np.ndarray]]:
        """(position, numbers from there on) of rows that pass the filter, batch by batch."""
        position = 0
        row_groups = self._row_groups(file)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if self.where is None:
                for begin in range(0, count, 1 << 20):
                    yield position + begin, np.arange(min(1 << 20, count - begin))
            elif group in row_groups:
                begin = position
                names = [name for name in self.where.columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(1 << 16, row_groups=[group], columns=names, use_threads=False):
                    table = self._for_filter(pa.Table.from_batches([batch]), address)
                    yield begin, np.flatnonzero(self.where.mask(table))
                    begin += batch.num_rows
            position += count

    def _row_groups(self, file: pq.ParquetFile) -> set[int]:
        """The row groups that can have a row that passes the filter."""
        if self.where is None or not set(self.where.columns) <= set(file.schema_arrow.names):
            return set(range(file.num_row_groups))
        return set(self.where.row_groups(file))

    def _read_span(self, file: pq.ParquetFile, address: str, columns: Columns, start: int, stop: int, folder: str,
                   ) -> Iterator[tuple[int, TableRow]]:
        """(position, row) of the rows of a file between start and stop that pass the filter."""
        position, row_groups = 0, self._row_groups(file)
        partition, features = self._partition_cells(address), class_features(file.schema_arrow)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if position < stop and position + count > start and group in row_groups:
                begin = position
                for batch in group_batches(file, address, group, _ROWS_AT_ONCE[columns.kind], start - begin,
                                           min(stop - begin, count), folder):
                    low, high = max(start - begin, 0), min(stop - begin, batch.num_rows)
                    if low < high:
                        table = pa.Table.from_batches([batch]).slice(low, high - low)
                        chosen = (np.flatnonzero(self.where.mask(self._for_filter(table, address))) if self.where else
                                  np.arange(table.num_rows))
                        table = table.take(pa.array(chosen)) if len(chosen) < table.num_rows else table
                        table, unnamed = name_classes(table, features)
                        rows = table_rows(table, self._text_columns, columns.whole)
                        for place, (number, row) in enumerate(zip(chosen.tolist(), rows, strict=True)):
                            if place in unnamed:
                                row.remarks = [*row.remarks, *unnamed[place]]
                            row.cells = partition | row.cells if partition else row.cells
                            yield begin + low + number, row
                    begin += batch.num_rows
                    if begin >= stop:
                        return
            position += count


def _part(spans: list[list[Any]], chosen: int) -> Part:
    spans = [span for span in spans if span[2] < span[3]]
    return Part({"spans": spans, "count": chosen,
                 "filtered": sum(stop - start for _, _, start, stop in spans) - chosen})
