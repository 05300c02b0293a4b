"""Samples by global row: what a neighbour list or a search result points at."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.media import tars


@dataclass(frozen=True)
class Sample:
    """A sample of a dataset: its key, caption, encoded picture and hash."""

    row: int
    key: str
    caption: str
    picture: bytes
    sha256: str


def samples(dataset: Dataset, rows: Sequence[int]) -> list[Sample]:
    """The samples at global `rows`, in that order; each tar is read once."""
    items = dataset.manifest("shards")["items"]
    offsets = np.cumsum([0, *(record["samples"] for record in items)])
    wanted = defaultdict(set)
    for row in rows:
        if not 0 <= row < offsets[-1]:
            raise ValueError(f"{dataset.label} has {offsets[-1]} samples, there is no row {row}")
        shard = int(np.searchsorted(offsets, row, side="right")) - 1
        wanted[shard].add(int(row - offsets[shard]))
    found = {}
    for shard, positions in wanted.items():
        meta = metadata(dataset, items[shard], ["key", "caption", "sha256"])
        last = max(positions)
        for position, sample in enumerate(tars.read(dataset.fetch("shards", file_of(items[shard], ".tar")))):
            if position in positions:
                row = int(offsets[shard]) + position
                found[row] = Sample(row, sample["__key__"], meta[position]["caption"] or "", tars.sample_image(sample),
                                    meta[position]["sha256"])
            if position == last:
                break
    return [found[int(row)] for row in rows]
