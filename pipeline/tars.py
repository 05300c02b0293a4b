"""The one door to webdataset: sample groups into tars and out of them, in order."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_iterator

PICTURE_SUFFIXES = ("jpg", "png", "webp")


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
    for suffix in PICTURE_SUFFIXES:
        if suffix in sample:
            return sample[suffix]
    raise ValueError(f"sample {sample.get('__key__')} has no picture; it has {sorted(sample)}")
