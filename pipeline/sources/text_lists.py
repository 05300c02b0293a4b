"""Read lists in CSV, TSV or JSON lines, compressed or not."""

import bz2
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.sources.rows import parse_json_row, replace_surrogates


def read_text_rows(address: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, a TSV or lines of JSON, one at a time."""
    name = address.lower()
    with storage.open_reader(address) as stream:
        # Not by fsspec's compression: one file imports fsspec, and the standard library has the same two readers.
        if name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stream, mode="r")
        elif name.endswith(".bz2"):
            stream = bz2.BZ2File(stream, mode="r")
        elif name.endswith(".zst"):
            stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        number = 0
        try:
            if (kind := text_list_ending(address)) in {"csv", "tsv"}:
                for row in csv.DictReader(lines, delimiter="\t" if kind == "tsv" else ","):
                    number += 1
                    row.pop(None, None)  # cells beyond the header
                    yield {key: value or None for key, value in row.items()}
            else:
                for line in lines:
                    number += 1
                    if line.strip():
                        row = parse_json_row(line)
                        yield {replace_surrogates(name): cell for name, cell in row.items()} if "\\u" in line else row
        except (UnicodeDecodeError, csv.Error, ValueError, EOFError, OSError, zlib.error) as error:
            if isinstance(error, storage.StorageError):
                raise
            raise ValueError(f"{address} cannot be read after row {number}: {error}\n"
                             f"hint: UTF-8; a CSV needs a header, JSON lines an object each") from None


def text_list_ending(address: str) -> str:
    """The suffix of the name of a list, without that of its compression: csv, tsv, jsonl or ndjson."""
    name = address.lower()
    for packed in (".gz", ".bz2", ".zst"):
        name = name.removesuffix(packed)
    return name.rpartition(".")[2]
