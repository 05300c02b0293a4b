"""Parquet files as tables, read in the thread that wants them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read(source: bytes | str | Path, columns: list[str] | None = None) -> pa.Table:
    """The table in a parquet file or in the bytes of one; of these columns, or all. ArrowException if it is none.

    Arrow's own threads, which its readers of files and of datasets start, may still be at it when the process ends,
    and abort it then: apache/arrow#34314.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)
