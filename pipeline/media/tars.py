"""Read and write the tars of a dataset."""

import contextlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.media.sample_names import FIRST_IMAGE_SUFFIXES, IMAGE_SUFFIXES, KEY_AND_SUFFIX, META_MEMBER
from pipeline.media.tar_members import DamagedTar, EndlessTar, Member, list_members
from pipeline.storage import DamagedFile


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

    A tar cut at a member boundary ends without an error: compare the count with the manifest. ValueError if it is
    damaged in any other way.
    """
    with open(tar, "rb") if isinstance(tar, Path) else contextlib.nullcontext(tar) as stream:
        length = stream.seek(0, os.SEEK_END)

        def read_at(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        name, current = getattr(stream, "name", "the tar"), dict[str, Any]()
        try:
            for key, suffix, member in _sample_members(list_members(read_at, length)):
                if key != current.get("__key__"):
                    if current:
                        yield current
                    current = {"__key__": key}
                if suffix in current:
                    raise DamagedFile(f"{name} has {member.name} twice\nhint: python -m jobs verify")
                if member.offset + member.size > length:
                    raise DamagedTar(f"in the middle of {member.name}")
                current[suffix] = read_at(member.offset, member.size)
        except EndlessTar:
            pass
        except DamagedTar as damage:
            raise DamagedFile(f"{name} is cut off {damage}\nhint: python -m jobs verify") from None
        if current:
            yield current


class TarImages:
    """The encoded images of a tar, read one by one, in any order and by any thread; len() is their number.

    Each takes 16 bytes of memory. The tar stays open, so it may be removed while it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as this is)
        if hasattr(os, "posix_fadvise"):
            # Read the whole file ahead: later requests have no order.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._positions = image_positions(path)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> bytes:
        offset, length = self._positions[position].tolist()
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) < length:
            raise DamagedFile(f"{self.path} is cut in the middle of sample {position}\nhint: python -m jobs verify")
        return data


def image_positions(path: Path) -> np.ndarray:
    """The offset and length of each sample's encoded image in a tar, (N, 2) int64, in bytes.

    The samples are those of `read`.
    """
    with open(path, "rb") as stream:
        return np.array(list(_image_positions(stream, path)), np.int64).reshape(-1, 2)


def _image_positions(stream: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    current: dict[str, Any] = {}
    members = list_members(lambda offset, size: os.pread(stream.fileno(), size, offset),
                           os.fstat(stream.fileno()).st_size)
    with contextlib.suppress(DamagedTar):  # what comes after it is missing, and its reader counts
        for key, suffix, member in _sample_members(members):
            if key != current.get("__key__"):
                if current:
                    yield _image_position(current, path)
                current = {"__key__": key}
            if suffix in current:
                raise DamagedFile(f"{path} has {member.name} twice\nhint: python -m jobs verify")
            current[suffix] = (member.offset, member.size)
    if current:
        yield _image_position(current, path)


def _image_position(sample: dict[str, Any], path: Path) -> tuple[int, int]:
    try:
        return sample_image(sample)
    except ValueError as error:
        raise DamagedFile(f"{path}: {error}\nhint: python -m jobs verify") from None


def _sample_members(members: Iterable[Member]) -> Iterator[tuple[str, str, Member]]:
    """Key, suffix and member of each file that belongs to a sample."""
    for member in members:
        if (member.kind == "file" and not META_MEMBER.match(member.name)
                and (parts := KEY_AND_SUFFIX.match(member.name))):
            yield parts[1], parts[2].lower(), member


def sample_image(sample: dict[str, Any]) -> Any:
    """The image of a sample: its encoded bytes, or whatever stands for them."""
    if (suffix := image_suffix(sample)) is not None:
        return sample[suffix]
    raise ValueError(f"sample {sample.get('__key__')} has no image; it has {sorted(sample)}")


def image_suffix(sample: dict[str, Any]) -> str | None:
    """The suffix of a sample's image, None if it has none."""
    for suffixes in (FIRST_IMAGE_SUFFIXES, IMAGE_SUFFIXES):
        if (suffix := next((suffix for suffix in sample if suffix.lower() in suffixes), None)) is not None:
            return suffix
    return None
