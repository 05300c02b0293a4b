"""Decompress a stream to its last byte: joined streams are read on, other bytes between them are an error.

`BZ2File` and `LZMAFile` end silently at bytes that they do not know. fsspec has the same readers.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

import pyarrow as pa

MAGICS = {"gzip": b"\x1f\x8b\x08", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstandard": b"\x28\xb5\x2f\xfd",
          "lz4": b"\x04\x22\x4d\x18"}
"""The first bytes of each kind."""
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard", ".lz4": "lz4"}
ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""Errors of a damaged stream."""
_CHUNK_BYTES = 64 << 10
HEAD_BYTES = 10
"""So many first bytes tell the kind also of a file that may be text."""
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")


def find_kind(head: bytes) -> str:
    """The kind of a file by its first `HEAD_BYTES`, "" if it is not compressed."""
    kind = next((name for name, magic in MAGICS.items() if head.startswith(magic)), "")
    return "" if kind == "bzip2" and head[4:10] not in _BZIP2_BLOCKS else kind


def decompress(stream: IO[bytes], kind: str) -> io.BufferedIOBase:
    """The decompressed stream. `kind`: a key of `MAGICS`. Its reads raise `ERRORS` if the stream is damaged."""
    if kind == "gzip":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if kind == "bzip2":
        return io.BufferedReader(_JoinedStreams(stream, kind, bz2.BZ2Decompressor))
    if kind == "xz":
        return io.BufferedReader(_JoinedStreams(stream, kind, lzma.LZMADecompressor))
    codec = "zstd" if kind == "zstandard" else kind
    return cast(io.BufferedIOBase, pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec))


class _JoinedStreams(io.RawIOBase):
    """Streams of one kind, one after another. Zeros between them and after them are padding."""

    def __init__(self, source: IO[bytes], kind: str, create: Callable[[], Any]) -> None:
        self._source, self._kind, self._create = source, kind, create
        self._decompressor = create()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._read(len(target))
        target[:len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        while True:
            if self._decompressor.eof:
                if not (data := self._next_stream()):
                    return b""
                self._decompressor = self._create()
            elif self._decompressor.needs_input:
                if not (data := self._source.read(_CHUNK_BYTES)):
                    raise EOFError("the file ends before its compressed data does")
            else:
                data = b""
            if unpacked := self._decompressor.decompress(data, size):
                return cast(bytes, unpacked)

    def _next_stream(self) -> bytes:
        """The first bytes of the next stream, b"" at the end of the file."""
        magic, data = MAGICS[self._kind], self._decompressor.unused_data.lstrip(b"\0")
        while len(data) < len(magic) and (more := self._source.read(_CHUNK_BYTES)):
            data = (data + more).lstrip(b"\0")
        if data and not data.startswith(magic):
            raise OSError(f"bytes that are not {self._kind} follow its compressed data")
        return cast(bytes, data)
