"""Read a column of bytes page by page, if its pages are too large for memory.

Writers of parquet check the size of a page after each 1,024 values. With images of 500 KB a page has 500 MB, and a
dictionary of images is one page of any size. pyarrow holds the page and its content in memory. Here both pass through
in pieces, and the values that are wanted wait in a file.

Format: https://parquet.apache.org/docs/file-format/ (pages, encodings, thrift's compact protocol).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.tables.snappy_stream import decompress_snappy

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8  # encodings
_CODECS = {"GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_HEADER_BYTES, _MOST_HEADER_BYTES = 1 << 12, 16 << 20
_PIECE = 1 << 20


class UnsupportedPage(ValueError):
    """A page that only pyarrow can read."""


@dataclass(frozen=True)
class Page:
    """The header of a page, and where its content is."""

    type: int
    offset: int
    size: int
    """Bytes in the file."""
    values: int
    encoding: int
    level_encoding: int
    level_bytes: int
    """Bytes of the definition levels that lie before the compressed part (pages of version 2)."""
    is_compressed: bool

    @property
    def has_indices(self) -> bool:
        """Whether values are numbers of entries of the dictionary."""
        return self.encoding in {_PLAIN_DICTIONARY, _RLE_DICTIONARY}


def read_page(stream: BinaryIO, offset: int) -> Page:
    """The header of the page at an offset."""
    size = _HEADER_BYTES
    while True:
        stream.seek(offset)
        data = stream.read(size)
        try:
            fields, length = _thrift_struct(data, 0)
            break
        except RecursionError:
            raise UnsupportedPage(f"no header of a page at {offset}") from None
        except IndexError:
            if len(data) < size or size > _MOST_HEADER_BYTES:
                raise UnsupportedPage(f"no header of a page at {offset}") from None
            size *= 16
    kind = _number(fields, 1)
    header = fields.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
    is_v2 = kind == _DATA_V2
    if not isinstance(header, dict) or (is_v2 and header.get(6)):
        raise UnsupportedPage("lists in lists, or a damaged header")
    return Page(kind, offset + length, _number(fields, 3), _number(header, 1, 0),
                _number(header, 4 if is_v2 else 2, _PLAIN), _RLE if is_v2 else _number(header, 3, _RLE),
                _number(header, 5, 0) if is_v2 else 0, header.get(7, True) is not False)


def _number(fields: dict[int, Any], number: int, default: int = -1) -> int:
    """A field that is a number and not negative."""
    value = fields.get(number, default)
    if not isinstance(value, int) or value < 0:
        raise UnsupportedPage(f"a header with {value} in its field {number}")
    return value


def read_values(stream: BinaryIO, file: pq.ParquetFile, group: int, column: int, start: int, stop: int, folder: str,
                ) -> Iterator[tuple[int, bytes | None]]:
    """(definition level, value) of the rows from start to stop of a row group, for a column of bytes without lists.

    `folder` is for a temporary file with values of the dictionary. UnsupportedPage before the first value, if pyarrow
    has to read the column.
    """
    chunk = file.metadata.row_group(group).column(column)
    leaf = file.schema.column(column)
    if chunk.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level or chunk.compression not in {
            "UNCOMPRESSED", "SNAPPY", *_CODECS}:
        raise UnsupportedPage(f"{chunk.physical_type}, {chunk.compression}")
    reader = _Reader(stream, chunk.compression, leaf.max_definition_level)
    pages = list(_pages(stream, chunk, file.metadata.row_group(group).num_rows))
    dictionary, parts, wanted, first = None, [], set[int](), 0
    for page in pages:
        if page.type == _DICTIONARY:
            dictionary = page
            continue
        low, high = max(start - first, 0), min(stop - first, page.values)
        if low < high:
            indices = reader.indices(page)[low:high] if page.has_indices else None
            wanted.update(() if indices is None else indices[indices >= 0].tolist())
            parts.append((page, low, high, indices))
        first += page.values
    if wanted and dictionary is None:
        raise UnsupportedPage("a dictionary that is missing")
    with tempfile.TemporaryFile(dir=folder) as spool:
        places = reader.spool_values(dictionary, wanted, spool) if dictionary and wanted else {}
        for page, low, high, indices in parts:
            levels = reader.levels(page)
            if indices is None:
                yield from reader.plain_values(page, levels, low, high)
                continue
            for level, index in zip(levels[low:high].tolist(), indices.tolist(), strict=True):
                yield level, None if index < 0 else _read_at(spool, *places[index])


def _pages(stream: BinaryIO, chunk: pq.ColumnChunkMetaData, rows: int) -> Iterator[Page]:
    """The pages of a column that have content: the dictionary, and data for so many rows."""
    offset = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end = offset + chunk.total_compressed_size
    while rows > 0 and offset < end:
        page = read_page(stream, offset)
        if page.type in {_DATA, _DATA_V2}:
            if page.level_encoding != _RLE or not (page.has_indices or page.encoding == _PLAIN):
                raise UnsupportedPage(f"encoding {page.encoding}")
            rows -= page.values
            yield page
        elif page.type == _DICTIONARY:
            yield page
        offset = page.offset + page.size
    if rows:
        raise UnsupportedPage("pages and rows that do not agree")


class _Reader:
    """Reads the pages of one column."""

    def __init__(self, stream: BinaryIO, compression: str, max_level: int) -> None:
        self._stream, self._compression, self._max_level = stream, compression, max_level

    def levels(self, page: Page) -> np.ndarray:
        """The definition level of each value: the highest one if it is not null."""
        if not self._max_level:
            return np.zeros(page.values, np.int64)
        if page.type == _DATA_V2:
            self._stream.seek(page.offset)
            data = self._stream.read(page.level_bytes)
        else:
            content = self._content(page)
            data = content.take(int.from_bytes(content.take(4), "little"))
        return _decode_runs(data, self._max_level.bit_length(), page.values)

    def indices(self, page: Page) -> np.ndarray:
        """The entry of the dictionary of each value, -1 for null."""
        present = self.levels(page) == self._max_level
        indices = np.full(page.values, -1)
        content = self._values(page)
        if present.any():
            width = content.take(1)[0]
            indices[present] = _decode_runs(content.rest(), width, int(present.sum())) if width else 0
        return indices

    def plain_values(self, page: Page, levels: np.ndarray, low: int, high: int) -> Iterator[tuple[int, bytes | None]]:
        """(level, value) of some values of a page."""
        content = self._values(page)
        for number, level in enumerate(levels[:high].tolist()):
            value = content.take_value() if level == self._max_level else None
            if number >= low:
                yield level, value

    def spool_values(self, page: Page, wanted: set[int], spool: BinaryIO) -> dict[int, tuple[int, int]]:
        """Write the wanted entries of a dictionary into a file. Returns their offsets and lengths."""
        content, places, end = self._content(page), {}, 0
        for number in range(max(wanted) + 1):
            value = content.take_value()
            if number in wanted:
                spool.write(value)
                places[number] = end, len(value)
                end += len(value)
        spool.flush()
        return places

    def _values(self, page: Page) -> _Content:
        """The content of a page after its levels."""
        content = self._content(page)
        if self._max_level and page.type == _DATA:
            content.take(int.from_bytes(content.take(4), "little"))
        return content

    def _content(self, page: Page) -> _Content:
        """The decompressed content of a page; of a page of version 2 without its levels."""
        position, end = page.offset + page.level_bytes, page.offset + page.size

        def read(count: int) -> bytes:
            nonlocal position
            self._stream.seek(position)
            data = self._stream.read(min(count, end - position))
            position += len(data)
            return data

        return _Content(self._decompress(read) if page.is_compressed else iter(lambda: read(_PIECE), b""))

    def _decompress(self, read: Callable[[int], bytes]) -> Iterator[bytes]:
        if self._compression == "SNAPPY":
            return decompress_snappy(read)
        if self._compression == "UNCOMPRESSED":
            return iter(lambda: read(_PIECE), b"")
        stream = pa.CompressedInputStream(pa.PythonFile(_Pieces(read), "r"), _CODECS[self._compression])
        return iter(lambda: stream.read(_PIECE), b"")


class _Pieces:
    """A function that reads, as a file."""

    closed = False

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read

    def close(self) -> None:
        """Nothing is open."""


class _Content:
    """Content that comes in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece, self._position = b"", 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        parts: list[bytes] = []
        while True:
            part = self._piece[self._position:self._position + count]
            self._position += len(part)
            count -= len(part)
            parts.append(part)
            if not count:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            self._piece, self._position = next(self._pieces, b""), 0
            if not self._piece:
                raise pa.ArrowInvalid("a page ends too early")

    def take_value(self) -> bytes:
        """The next value of a plain column of bytes: its length and itself."""
        return self.take(int.from_bytes(self.take(4), "little"))

    def rest(self) -> bytes:
        """All that is left."""
        return b"".join([self._piece[self._position:], *self._pieces])


def _read_at(spool: BinaryIO, offset: int, length: int) -> bytes:
    spool.seek(offset)
    return spool.read(length)


def _decode_runs(data: bytes, width: int, count: int) -> np.ndarray:
    """Numbers of some bits each, in runs of equal ones and groups of eight."""
    parts, position, found = [], 0, 0
    value_bytes = (width + 7) // 8
    while found < count:
        header, position = _varint(data, position)
        if header & 1:
            groups = np.frombuffer(data, np.uint8, (header >> 1) * width, position)
            bits = np.unpackbits(groups, bitorder="little").reshape(-1, width).astype(np.int64)
            parts.append(bits @ (1 << np.arange(width)))
            position += len(groups)
        else:
            value = int.from_bytes(data[position:position + value_bytes], "little")
            parts.append(np.full(min(header >> 1, count - found), value))
            position += value_bytes
        if not len(parts[-1]):
            raise pa.ArrowInvalid("an empty run in a page")
        found += len(parts[-1])
    return np.concatenate(parts)[:count] if parts else np.zeros(0, np.int64)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, position


def _thrift_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct in thrift's compact protocol by their numbers, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while (kind := data[position]):
        position += 1
        if kind >> 4:
            field += kind >> 4
        else:
            number, position = _varint(data, position)
            field = (number >> 1) ^ -(number & 1)
        fields[field], position = _thrift_value(data, position, kind & 15)
    return fields, position + 1


def _thrift_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in {1, 2}:  # true, false
        return kind == 1, position
    if kind in {3, 4, 5, 6}:  # integers
        if kind == 3:
            return data[position], position + 1
        number, position = _varint(data, position)
        return (number >> 1) ^ -(number & 1), position
    if kind == 8:  # bytes, of the statistics
        length, position = _varint(data, position)
        if position + length > len(data):
            raise IndexError
        return None, position + length
    if kind == 12:
        return _thrift_struct(data, position)
    raise UnsupportedPage(f"a header with a field of type {kind}")
