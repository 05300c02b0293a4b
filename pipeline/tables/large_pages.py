"""Read row groups in batches, in bounded memory even if the images of a group lie in one page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.tables.parquet_pages import UnsupportedPage, read_page, read_values

LARGE_PAGE_BYTES = 32 << 20
_BATCH_BYTES = 8 << 20
"""A batch of rows from large pages has about so many bytes."""
_MOST_RATIO = 1.5
"""A page that compresses better has many short copies, which take Python long: pyarrow reads it."""


def group_batches(file: pq.ParquetFile, address: str, group: int, size: int, start: int, stop: int, folder: str,
                  ) -> Iterator[pa.RecordBatch]:
    """The batches of a row group from its first row on, of at most `size` rows, up to the row `stop`.

    Rows before `start` may be null. `folder` is for temporary files. ArrowException for a damaged file.
    """
    row_group = file.metadata.row_group(group)
    if row_group.total_byte_size > LARGE_PAGE_BYTES and start < stop:
        with storage.open_reader(address) as stream:
            columns = _large_columns(file, stream, group)
            values = {name: read_values(stream, file, group, column, start, stop, folder)
                      for name, column in columns.items()}
            try:
                values = {name: itertools.chain([next(each)], each) for name, each in values.items()}
            except (ValueError, IndexError):  # pyarrow knows more, and says what is damaged
                values = {}
            if values:
                size = max(1, min(size, _BATCH_BYTES * row_group.num_rows // row_group.total_byte_size))
                others = [row_group.column(number).path_in_schema for number in range(row_group.num_columns)
                          if number not in columns.values()]
                batches = file.iter_batches(size, row_groups=[group], columns=others, use_threads=False)
                yield from _with_values(batches, file.schema_arrow, values, start, stop)
                return
    yield from file.iter_batches(size, row_groups=[group], use_threads=False)


def _with_values(batches: Iterator[pa.RecordBatch], schema: pa.Schema,
                 values: dict[str, Iterator[tuple[int, bytes | None]]], start: int, stop: int,
                 ) -> Iterator[pa.RecordBatch]:
    """Batches with the columns that were read apart; those before `start` are null."""
    position = 0
    for batch in batches:
        low, high = (min(max(bound - position, 0), batch.num_rows) for bound in (start, stop))
        position += batch.num_rows
        if low == high:
            yield pa.RecordBatch.from_arrays([pa.nulls(batch.num_rows, field.type) for field in schema], schema=schema)
            continue
        try:
            rows = {name: [(0, None)] * low + list(itertools.islice(each, high - low))
                    + [(0, None)] * (batch.num_rows - high) for name, each in values.items()}
        except (ValueError, IndexError) as error:
            raise pa.ArrowInvalid(f"a page of a column is damaged: {error}") from error
        yield pa.RecordBatch.from_arrays(
            [_column(field, batch, rows[field.name]) if field.name in rows else batch.column(field.name)
             for field in schema], schema=schema)
        if position >= stop:
            return


def _column(field: pa.Field, batch: pa.RecordBatch, rows: list[tuple[int, bytes | None]]) -> pa.Array:
    """A column of bytes, or of structs with a field `bytes`, from its values and the fields that pyarrow has read."""
    if not pa.types.is_struct(field.type):
        return pa.array([value for _, value in rows], field.type)
    if field.name in batch.schema.names:
        struct = batch.column(field.name)
        fields = dict(zip((child.name for child in struct.type), struct.flatten(), strict=True))
        is_null = struct.is_null()
    else:
        fields, is_null = {}, pa.array([level == 0 and field.nullable for level, _ in rows])
    kind = field.type.field("bytes").type
    fields["bytes"] = pa.array([value for _, value in rows], kind)
    return pa.StructArray.from_arrays([fields[child.name] for child in field.type], fields=list(field.type),
                                      mask=is_null)


def _large_columns(file: pq.ParquetFile, stream: BinaryIO, group: int) -> dict[str, int]:
    """Columns with a first page or dictionary that is large: their names, and their numbers among the leaves."""
    row_group, schema = file.metadata.row_group(group), file.schema_arrow
    paths = {}
    for field in schema:
        if schema.names.count(field.name) > 1 or "." in field.name:
            return {}  # pyarrow chooses columns by their names
        if _is_bytes(field.type):
            paths[field.name] = field.name
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0 and _is_bytes(
                field.type.field("bytes").type):
            paths[f"{field.name}.bytes"] = field.name
    large = {}
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        if (chunk.path_in_schema in paths and chunk.total_compressed_size > LARGE_PAGE_BYTES
                and chunk.total_uncompressed_size < _MOST_RATIO * chunk.total_compressed_size
                and _has_large_page(stream, chunk)):
            large[paths[chunk.path_in_schema]] = number
    return large


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_large_page(stream: BinaryIO, chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether the dictionary or the first page of a column is large. The pages after it are of the same kind."""
    offset = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    try:
        first = read_page(stream, offset)
        return max(first.size, read_page(stream, first.offset + first.size).size if chunk.has_dictionary_page else 0
                   ) > LARGE_PAGE_BYTES
    except UnsupportedPage:
        return False
