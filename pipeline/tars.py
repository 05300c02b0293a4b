"""Tars of samples: written and read through webdataset, and read with suspicion where others wrote them."""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import webdataset as wds
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

PICTURE_SUFFIXES = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "tif", "tiff", "avif")


def write(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples ({"__key__": ..., suffix: bytes}) as a tar: equal samples give equal bytes."""
    with open(path, "wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0, user="0", group="0") as writer:
        for sample in samples:
            writer.write(sample)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar in order, as {"__key__": ..., suffix: bytes}.

    A tar cut at a member boundary ends without an error: compare the count with the manifest.
    """
    with open(path, "rb") as stream:
        files = ({**file, "__url__": str(path)} for file in tar_file_iterator(stream))
        yield from group_by_keys(files)


def picture(sample: dict[str, Any]) -> bytes:
    """The encoded picture of a sample."""
    if (suffix := picture_suffix(sample)) is not None:
        return sample[suffix]
    raise ValueError(f"sample {sample.get('__key__')} has no picture; it has {sorted(sample)}")


def picture_suffix(sample: dict[str, Any]) -> str | None:
    """The suffix of a sample's picture, None if it has none."""
    return next((suffix for suffix in sample if suffix.lower() in PICTURE_SUFFIXES), None)


@dataclass
class Suspicions:
    """What is wrong with a tar as a whole, or with members that no sample is made of."""

    members: list[tuple[str, str, str]] = field(default_factory=list)
    """(member, reason, detail)"""
    cut: str = ""
    """Why the tar is taken for cut off, "" if it ends as a tar does."""


def examine(path: Path, found: Suspicions) -> Iterator[dict[str, Any]]:
    """The samples of a tar that others wrote; what is wrong is added to `found`.

    Nothing is ever unpacked to the disk; members with paths that lead outside, links and devices are
    refused all the same, for whoever unpacks the tar later.
    """
    current: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if name.startswith("/") or ".." in name.split("/"):
                    found.members.append((member.name, "unsafe_member", "its path leads outside"))
                elif not member.isreg():
                    if not member.isdir():
                        found.members.append((member.name, "unsafe_member", "neither file nor folder"))
                else:
                    key, suffix = base_plus_ext(name)
                    if not key or key.rsplit("/", 1)[-1].startswith("."):
                        continue
                    stream = tar.extractfile(member)
                    assert stream is not None
                    data = stream.read()
                    if len(data) < member.size:
                        found.cut = f"in the middle of {member.name}"
                        return
                    if current and current["__key__"] != key:
                        yield current
                        current = {}
                    current.setdefault("__key__", key)
                    current[suffix.lower()] = data
                tar.members = []  # or it keeps a header of every member
            # A tar ends with two blocks of zeros: without them it was cut between two members.
            tar.fileobj.seek(tar.offset)
            if len(tar.fileobj.read(512)) < 512:
                found.cut = "between two members: it has no end"
    except tarfile.TarError as error:
        found.cut = f"where its reader stops: {error}"
    if current:
        yield current
