"""Files of text as rows: CSV, TSV, JSON and lists of URLs, compressed or not."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import IO, cast

from pipeline import storage
from pipeline.formats import decompression
from pipeline.tables.cells import JsonDecoder, TableRow
from pipeline.tables.delimited import RepairedLine, encoding_remarks, named_delimiter, read_delimited, repair_lines
from pipeline.tables.json_tables import read_json_document, read_json_lines
from pipeline.tables.names import table_kind

_PIECE = 1 << 20  # characters of a JSON document that are read together
_ZIP = "PK\3\4"
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # its first two bytes, as they are decoded here


def read_rows(address: str, columns: Sequence[str] = ()) -> Iterator[TableRow]:
    """The rows of a file, one at a time; ValueError if the file itself cannot be read.

    `columns`: the names of the columns of a CSV, TSV or `.txt` file without a header.
    """
    number = 0
    with storage.open_reader(address) as stream:
        try:
            for row in _rows(_decompress(stream, address), address, columns):
                number += 1
                yield row
        except (csv.Error, ValueError, *decompression.ERRORS) as error:
            if isinstance(error, storage.StorageError):
                raise
            hint = ("" if "\nhint: " in str(error) else "\nhint: the file is cut off or damaged: copy it again"
                    if isinstance(error, decompression.ERRORS) else
                    "\nhint: tables are UTF-8; a CSV has a header, JSON has objects")
            raise ValueError(f"{address} cannot be read after row {number}: {error}{hint}") from None


def read_header(address: str) -> list[str]:
    """The column names of a CSV or TSV, [] if it is empty."""
    with storage.open_reader(address) as stream:
        text = io.TextIOWrapper(_decompress(stream, address), "utf-8-sig", "replace", newline="")
        is_csv = table_kind(address) == "csv"
        first = text.readline()
        delimiter = named_delimiter(first) if is_csv else ""
        lines = text if delimiter else itertools.chain([first], text)
        header = next(csv.reader(lines, delimiter=delimiter or ("," if is_csv else "\t")), [])
        return [name.removeprefix("\ufeff") for name in header]


def read_first_cells(address: str) -> list[str]:
    """The cells in the first line of a TSV without quotes, [] if it cannot be read."""
    with storage.open_reader(address) as stream:
        try:
            text = io.TextIOWrapper(_decompress(stream, address), "utf-8-sig", "replace", newline="\n")
            return text.readline(_PIECE).rstrip("\r\n").split("\t")
        except decompression.ERRORS as error:
            if isinstance(error, storage.StorageError):
                raise
            return []  # the reader of its rows says what is wrong


def _rows(stream: IO[bytes], address: str, columns: Sequence[str]) -> Iterator[TableRow]:
    kind, file = table_kind(address), address.rpartition("/")[2]
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n")  # cells may hold carriage returns
    limit = _PIECE if kind == "json" else -1
    head = [text.readline(limit), text.readline(limit)]
    if head[0].startswith(_UTF16) or "\0" in head[0][:4]:
        raise ValueError(f"the text is UTF-16 or UTF-32\nhint: iconv -f UTF-16 -t UTF-8 {file} > utf8_{file}")
    if head[0].startswith(_ZIP):
        raise ValueError("it is a zip archive, as .xlsx files are\nhint: unpack it, or export it as CSV")
    if kind == "json" and not (_is_object(head[0]) and head[1].strip()):
        return read_json_document(itertools.chain(head, iter(lambda: text.read(_PIECE), "")), file)
    lines: Iterator[str] = itertools.chain(filter(None, head), text)
    if "\r" in head[0].strip("\r\n") and not head[1]:  # Excel on old Macs ended lines so
        lines = (f"{line}\n" for line in head[0].split("\r"))
    if kind == "txt" and not columns:
        return _read_urls(lines, file)
    if kind in {"csv", "tsv", "txt"}:
        return read_delimited(lines, file, "," if kind == "csv" else "\t", columns)
    return read_json_lines(lines, file)


def _is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return bool(JsonDecoder().parse_row(line))
    except ValueError:
        return False


def _read_urls(lines: Iterator[str], file: str) -> Iterator[TableRow]:
    """A URL in each line; lines of JSON, as the Smithsonian has them in `.txt` files, are read as such."""
    lines = (line for line in lines if line.strip())
    first = next(lines, "")
    lines = itertools.chain([first] if first else [], lines)
    if first.lstrip().startswith("{"):
        yield from read_json_lines(lines, file)
        return
    for line in repair_lines(lines):
        cells = {"url": line.strip()}
        yield TableRow(cells, encoding_remarks(cells) if isinstance(line, RepairedLine) else ())


def _decompress(stream: IO[bytes], address: str) -> IO[bytes]:
    """The stream, decompressed as its first bytes say, or else its name."""
    kind = (decompression.find_kind(stream.read(decompression.HEAD_BYTES))
            or decompression.SUFFIXES.get(f".{address.lower().rpartition('.')[2]}"))
    stream.seek(0)
    return cast(IO[bytes], decompression.decompress(stream, kind)) if kind else stream
