"""Samples by global row: the targets of neighbor lists and search results."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.media import tars

_LEAST_SHARE = 3
"""If the images are more than one part in so many of a tar's bytes, one read of the whole tar costs less."""
_THREADS = 16
"""Images of one tar that are read at a time. On S3 each read is a round trip."""


@dataclass(frozen=True)
class Sample:
    """A sample of a dataset: its key, caption, encoded image, hash, and the URL or path of its source."""

    row: int
    key: str
    caption: str
    picture: bytes
    sha256: str
    url: str = ""

    @property
    def name(self) -> str:
        """The name for people, see `row_name`."""
        return row_name(self.caption, self.url, self.row)


def row_name(caption: str, url: str, row: int) -> str:
    """The caption of a row, else its file name, else its number."""
    return caption or file_name(url) or f"row {row}"


def file_name(url: str) -> str:
    """The last part of a path or URL, as people write it."""
    return unquote(url.rstrip("/").rpartition("/")[2])


def samples(dataset: Dataset, rows: Sequence[int]) -> list[Sample]:
    """The samples at global `rows`, in that order.

    Each image takes one ranged read. Three cases need the whole tar: many of its images are wanted, an image does not
    have the hash of its metadata, or the metadata are of version 0.1, which did not store positions.
    """
    items = dataset.manifest("shards")["items"]
    offsets = np.cumsum([0, *(record["samples"] for record in items)])
    wanted = defaultdict(set)
    for row in rows:
        if not 0 <= row < offsets[-1]:
            raise ValueError(f"{dataset.label} has {offsets[-1]} samples, there is no row {row}")
        shard = int(np.searchsorted(offsets, row, side="right")) - 1
        wanted[shard].add(int(row - offsets[shard]))
    samples_by_row = {}
    for shard, positions in wanted.items():
        meta = metadata(dataset, items[shard], ["key", "caption", "url", "sha256", "image_offset", "image_bytes"])
        images = _images(dataset, file_of(items[shard], ".tar"), meta, sorted(positions))
        for position, (key, image) in images.items():
            row = int(offsets[shard]) + position
            about = meta[position]
            samples_by_row[row] = Sample(row, key, about["caption"] or "", image, about["sha256"],
                                         about.get("url") or "")
    return [samples_by_row[int(row)] for row in rows]


def _images(dataset: Dataset, tar: dict[str, Any], meta: Sequence[dict[str, Any]], positions: Sequence[int]
            ) -> dict[int, tuple[str, bytes]]:
    """The key and the image at each of the ascending `positions` of a tar."""
    lengths = [length for position in positions if (length := meta[position].get("image_bytes")) is not None]
    if len(lengths) == len(positions) and _LEAST_SHARE * sum(lengths) < tar["bytes"]:
        url = storage.manifest_file_url(dataset.folder("shards"), tar["name"])
        local = str(storage.local_copy(url, tar) or url)

        def read_image(position: int) -> bytes:
            start = meta[position]["image_offset"]
            return storage.read_range(local, start, start + meta[position]["image_bytes"])

        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(read_image, positions))
        if all(hashlib.sha256(image).hexdigest() == meta[position]["sha256"]
               for position, image in zip(positions, images, strict=True)):
            return {position: (meta[position]["key"], image)
                    for position, image in zip(positions, images, strict=True)}
    images_by_position = {}
    for position, sample in enumerate(tars.read(dataset.fetch("shards", tar))):
        if position in positions:
            images_by_position[position] = sample["__key__"], tars.sample_image(sample)
        if position == positions[-1]:
            break
    return images_by_position
