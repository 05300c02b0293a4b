"""Unpack compressed tars (gzip, bzip2, zstandard), which are known by their first bytes, whatever their name."""

import bz2
import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

_MAGICS = {"gzip": b"\x1f\x8b\x08", "bzip2": b"BZh", "zstandard": b"\x28\xb5\x2f\xfd"}
_TAR_MAGIC_PLACE = slice(257, 262)
_CHUNK_BYTES = 64 << 10  # where the data is damaged, the bytes of one chunk before it are lost
MOST_RATIO, LEAST_LIMIT_BYTES = 100, 1 << 30
"""A file of many zeros is compressed a thousand times. Images and captions are compressed at most 20 times."""


def compression(stream: BinaryIO) -> str:
    """The name of the compression of an open file, "" if it is not compressed."""
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    if head[_TAR_MAGIC_PLACE] == b"ustar":  # the name of a first member may begin with any bytes
        return ""
    return next((name for name, magic in _MAGICS.items() if head.startswith(magic)), "")


def unpack_tar(source: BinaryIO, target: BinaryIO, most_bytes: int) -> str:
    """Write the bytes of a compressed tar to `target`. Returns why it ends early, "" if it is whole.

    `most_bytes`: write no more.
    """
    unpacked, kind = 0, compression(source)
    try:
        stream = _open(source, kind)
        while data := stream.read(_CHUNK_BYTES):
            data = data[:most_bytes - unpacked]
            unpacked += target.write(data)
            if unpacked == most_bytes and stream.read(1):
                return f"it has more than {most_bytes} bytes when unpacked"
    except (EOFError, OSError, zlib.error) as error:
        return f"its {kind} data is damaged after {unpacked} bytes ({error})"
    return ""


def most_unpacked_bytes(packed_bytes: int) -> int:
    """How many bytes a compressed tar of a size may have when it is unpacked."""
    return max(LEAST_LIMIT_BYTES, MOST_RATIO * packed_bytes)


def unpack_file(path: Path, target: Path) -> str:
    """As `unpack_tar`, for files, with the limit for the size of the file."""
    with open(path, "rb") as source, open(target, "wb") as stream:
        return unpack_tar(source, stream, most_unpacked_bytes(path.stat().st_size))


def _open(source: BinaryIO, kind: str) -> BinaryIO:
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=source, mode="rb"))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(source))
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(source, "r"), "zstd"))
