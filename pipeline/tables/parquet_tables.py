"""Open parquet files of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.formats import parquet


@contextmanager
def open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, read in pieces; ValueError if it is damaged."""
    try:
        with storage.open_reader(address) as stream:
            try:
                # Buffered, or a row group would be read whole however small the batches are.
                file = parquet.open_file(stream, buffer_size=1 << 20, pre_buffer=False)
                if dictionaries := _dictionary_columns(file):
                    file = parquet.open_file(stream, metadata=file.metadata, buffer_size=1 << 20, pre_buffer=False,
                                             read_dictionary=dictionaries)
                yield file
            except OSError as error:
                if error.errno is not None or isinstance(error, storage.StorageError):
                    raise
                raise pa.ArrowInvalid(str(error)) from error  # damaged pages, and not the disk
    except pa.ArrowException as error:
        raise ValueError(f"{address} cannot be read as parquet: {str(error).strip()}\n"
                         f"hint: the file is cut off, damaged or of another kind: copy it again") from None


def _dictionary_columns(file: pq.ParquetFile) -> list[str]:
    """The columns that the writer had as Arrow dictionaries, such as categories of pandas.

    pyarrow 26 refuses all rows of such a column if one text is not UTF-8, unless `read_dictionary` has
    the column.
    """
    names = [field.name for field in file.schema_arrow if "dictionary<" in str(field.type)]
    paths = [file.schema.column(number).path for number in range(len(file.schema))] if names else []
    return [path for path in paths if any(path == name or path.startswith(f"{name}.") for name in names)]


def read_schema(address: str) -> pa.Schema:
    """The schema of a parquet file."""
    with open_parquet(address) as file:
        return file.schema_arrow
