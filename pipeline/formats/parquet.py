"""Parquet files as tables, read in the thread that wants them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read(source: bytes | str | Path, columns: list[str] | None = None) -> pa.Table:
    """The table in a parquet file or in the bytes of one; of these columns, or all. ArrowException if it is none.

    Arrow's own threads, which its readers of files and of datasets start, may still be at it when the process ends,
    and abort it then: apache/arrow#34314.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return open_file(pa.BufferReader(data)).read(columns, use_threads=False)


def open_file(source: Any, **options: Any) -> pq.ParquetFile:
    """A parquet file. ArrowException if it is none, also if the name of a column is not UTF-8."""
    try:
        return pq.ParquetFile(source, **options)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"the name of a column is not UTF-8: {error.object!r}") from None


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table. Bytes in texts that are not UTF-8 become question marks, and nested texts with such None."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        columns = [_cells(column) for column in table.columns]
        return [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cells(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [None if cell is None else cell.decode("utf-8", "replace")
                for cell in column.cast(pa.large_binary()).to_pylist()]
    return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None
