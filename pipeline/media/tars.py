"""Read and write the tars of a dataset."""

import contextlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.media.foreign_tars import KEY_AND_SUFFIX, META_MEMBER

IMAGE_SUFFIXES = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "tif", "tiff", "avif")


def write(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples ({"__key__": ..., suffix: bytes}) as a tar: equal samples give equal bytes."""
    with TarWriter(path) as writer:
        for sample in samples:
            writer.add(sample)


class TarWriter:
    """Writes a tar of samples with the bytes of webdataset's TarWriter; a context manager."""

    # Why not webdataset's TarWriter: it loads torch, which workers of `shard` need for nothing else. tarfile makes
    # the headers (its default format, PAX, has other bytes). Its `addfile` keeps the header of every member in memory.

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def add(self, sample: dict[str, Any]) -> None:
        """Append the members of a sample, {"__key__": ..., suffix: bytes}."""
        for suffix in sorted(sample):
            if suffix.startswith("_"):
                continue
            data = sample[suffix]
            member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
            member.size, member.mode, member.uname, member.gname = len(data), 0o444, "0", "0"
            self._stream.write(member.tobuf(tarfile.USTAR_FORMAT))
            self._stream.write(data)
            self._stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if not any(error):
            # Two blocks of zeros end a tar, and more fill its last record.
            self._stream.write(bytes(2 * tarfile.BLOCKSIZE))
            self._stream.write(bytes(-self._stream.tell() % tarfile.RECORDSIZE))
        self._stream.close()


def read(tar: Path | BinaryIO) -> Iterator[dict[str, Any]]:
    """The samples of a tar, a path or an open file, in order, as {"__key__": ..., suffix: bytes}.

    A tar cut at a member boundary ends without an error: compare the count with the manifest.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with open(tar, "rb") if isinstance(tar, Path) else contextlib.nullcontext(tar) as stream:
        files = ({**file, "__url__": str(stream.name)} for file in tar_file_iterator(stream))
        yield from group_by_keys(files)


class TarImages:
    """The encoded images of a tar, read one by one, in any order and by any thread; len() is their number.

    Each takes 16 bytes of memory. The tar stays open, so it may be removed while it is read.
    """

    # webdataset reads a tar only from its first byte to its last.

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as this is)
        if hasattr(os, "posix_fadvise"):
            # From the first byte to the last and ahead: what is asked for later comes in no order.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._positions = np.array(list(_image_positions(self._file, path)), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> bytes:
        offset, length = self._positions[position].tolist()
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) < length:
            raise ValueError(f"{self.path} is cut in the middle of sample {position}\nhint: python -m jobs verify")
        return data


def _image_positions(stream: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """Where the picture of each sample begins and how long it is; samples are made of members as by `read`."""
    current: dict[str, Any] = {}
    for name, offset, length in _list_members(stream):
        if not (parts := KEY_AND_SUFFIX.match(name)) or META_MEMBER.match(name):
            continue
        key, suffix = parts.groups()
        if key != current.get("__key__"):
            if current:
                yield sample_image(current)
            current = {"__key__": key}
        if (suffix := suffix.lower()) in current:
            raise ValueError(f"{path} has {name} twice\nhint: python -m jobs verify")
        current[suffix] = (offset, length)
    if current:
        yield sample_image(current)


def _list_members(stream: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of each file in a tar; of what its end is missing from, those before."""
    offset = 0
    while (header := os.pread(stream.fileno(), tarfile.BLOCKSIZE, offset)) and any(header):
        if (name_and_length := parse_header(header)) is None:
            yield from _list_any_members(stream, offset)
            return
        name, length = name_and_length
        yield name, offset + tarfile.BLOCKSIZE, length
        offset += tarfile.BLOCKSIZE + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _list_any_members(stream: BinaryIO, start: int) -> Iterator[tuple[str, int, int]]:
    """As `_list_members` from an offset on, for headers of any kind."""
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all headers; typeshed lacks it
                if member.isreg():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError:
        return  # a damaged header: what comes after it is missing, and its reader counts


def parse_header(header: bytes) -> tuple[str, int] | None:
    """Name and length in the header of a file as `TarWriter` makes it, None for any other header.

    tarfile takes three times as long: a tenth of the time to decode an image of 256 pixels.
    """
    # A regular file of POSIX's format without a prefix to its name; longer names and sizes have other headers.
    if header[156:157] not in b"0\0" or header[257:265] != b"ustar\x0000" or header[345]:
        return None
    try:
        length, checksum = (int(header[start:end].rstrip(b"\0 "), 8) for start, end in ((124, 136), (148, 156)))
    except ValueError:
        return None
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    return header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"), length


def sample_image(sample: dict[str, Any]) -> Any:
    """The picture of a sample: its encoded bytes, or whatever stands for them."""
    if (suffix := image_suffix(sample)) is not None:
        return sample[suffix]
    raise ValueError(f"sample {sample.get('__key__')} has no picture; it has {sorted(sample)}")


def image_suffix(sample: dict[str, Any]) -> str | None:
    """The suffix of a sample's picture, None if it has none."""
    return next((suffix for suffix in sample if suffix.lower() in IMAGE_SUFFIXES), None)
