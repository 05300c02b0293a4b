"""Open parquet files of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage


@contextmanager
def open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, read in pieces; ValueError if it is damaged."""
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
        raise ValueError(f"{address} cannot be read as parquet: {str(error).strip()}\n"
                         f"hint: the file is cut off, damaged or of another kind: copy it again") from None


def read_schema(address: str) -> pa.Schema:
    """The schema of a parquet file."""
    with open_parquet(address) as file:
        return file.schema_arrow
