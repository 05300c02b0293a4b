"""Unpack compressed tars (gzip, bzip2, xz, zstandard, lz4). The first bytes of a file tell its compression."""

from pathlib import Path
from typing import BinaryIO

from pipeline.formats.decompression import ERRORS, MAGICS, decompress

_TAR_MAGIC_PLACE = slice(257, 262)
_CHUNK_BYTES = 4 << 10  # at most so many bytes before a damage are lost; bzip2 and zstandard lose their block
MOST_RATIO, LEAST_LIMIT_BYTES = 100, 1 << 30
"""A file of many zeros is compressed a thousand times. Images and captions are compressed at most 20 times."""


def compression(stream: BinaryIO) -> str:
    """The name of the compression of an open file, "" if it is not compressed."""
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    if head[_TAR_MAGIC_PLACE] == b"ustar":  # the name of a first member may begin with any bytes
        return ""
    return next((name for name, magic in MAGICS.items() if head.startswith(magic)), "")


def unpack_tar(source: BinaryIO, target: BinaryIO, most_bytes: int) -> str:
    """Write the bytes of a compressed tar to `target`. Returns why it ends early, "" if it is whole.

    `most_bytes`: write no more.
    """
    unpacked, kind = 0, compression(source)
    try:
        stream = decompress(source, kind)
        while data := stream.read1(_CHUNK_BYTES):  # `read` would lose what it has before an error
            data = data[:most_bytes - unpacked]
            unpacked += target.write(data)
            if unpacked == most_bytes and stream.read(1):
                return f"it has more than {most_bytes} bytes when unpacked"
    except ERRORS as error:
        return f"its {kind} data is damaged after {unpacked} bytes ({error})"
    return ""


def most_unpacked_bytes(packed_bytes: int) -> int:
    """How many bytes a compressed tar of a size may have when it is unpacked."""
    return max(LEAST_LIMIT_BYTES, MOST_RATIO * packed_bytes)


def unpack_file(path: Path, target: Path) -> str:
    """As `unpack_tar`, for files, with the limit for the size of the file."""
    with open(path, "rb") as source, open(target, "wb") as stream:
        return unpack_tar(source, stream, most_unpacked_bytes(path.stat().st_size))
