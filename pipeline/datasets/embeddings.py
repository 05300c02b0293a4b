"""Memory-mapped vectors of a dataset, by global row."""

import mmap
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import NO_NUMBER
from pipeline.formats.arrays import map_array
from pipeline.storage import DamagedFile


def check_finite(vectors: np.ndarray, place: str) -> np.ndarray:
    """The vectors (..., D) as they are; ValueError if one is not finite."""
    if vectors.dtype == np.float16 and not ((vectors.view(np.uint16) & NO_NUMBER) == NO_NUMBER).any():
        return vectors  # as below, ten times faster
    good = np.isfinite(vectors).all(-1)
    if not good.all():
        raise DamagedFile(f"{int((~good).sum())} vectors of {place} are not finite\n"
                          f"hint: python -m jobs verify")
    return vectors


class Embeddings:
    """The embeddings of a dataset by global row, memory-mapped shard by shard.

    len() is the number of rows N; `dim` is D. Rows are float16 and of unit length, or all zero
    where an image could not be decoded.
    """

    def __init__(self, dataset: Dataset, stage_name: str = "embeddings") -> None:
        self.manifest = dataset.manifest(stage_name)
        self.folder = dataset.folder(stage_name)
        self.shards = [dataset.open_file(stage_name, file_of(record, ".npy"), map_array)
                       for record in self.manifest["items"]]
        self.offsets = np.cumsum([0, *(len(shard) for shard in self.shards)])
        for shard, record in zip(self.shards, self.manifest["items"], strict=True):
            if len(shard) != record["samples"]:
                raise DamagedFile(f"{self.folder}: shard {record['id']} has {len(shard)} rows, its "
                                  f"manifest says {record['samples']}\nhint: python -m jobs verify")
            if shard.ndim != 2 or shard.shape[1] != self.shards[0].shape[1]:
                raise DamagedFile(f"{self.folder}: shard {record['id']} has vectors of shape {shard.shape[1:]}, "
                                  f"the first one {self.shards[0].shape[1:]}\nhint: python -m jobs verify")

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def dim(self) -> int:
        """Length D of a vector."""
        return int(self.shards[0].shape[1])

    def all(self) -> np.ndarray:
        """Every row, (N, D) float16, in memory."""
        return check_finite(np.concatenate(self.shards), self.folder)

    def rows(self, ids: np.ndarray, *, once: bool = False) -> np.ndarray:
        """The rows `ids` (any shape S, int64) as (*S, D) float16; zeros for the id -1 (none); ValueError for NaN.

        With `once` a shard leaves memory after it was read.
        """
        flat = np.asarray(ids, np.int64).reshape(-1)
        out = np.zeros((len(flat), self.dim), np.float16)
        order = np.argsort(flat, kind="stable")
        ends = np.searchsorted(flat[order], self.offsets)
        for number in np.flatnonzero(np.diff(ends)):
            here = order[ends[number]:ends[number + 1]]
            out[here] = check_finite(self.shards[number][flat[here] - self.offsets[number]], self.folder)
            if once:
                # numpy keeps the map private, and its stubs do not have it.
                self.shards[number]._mmap.madvise(mmap.MADV_DONTNEED)
        return out.reshape(*np.shape(ids), self.dim)

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Every row in order, as (first row, (n, D) float16) with n at most `rows`, read and not mapped."""
        pieces: list[np.ndarray] = []
        first = here = 0
        for shard in self.shards:
            done = 0
            while done < len(shard):
                count = min(rows - here, len(shard) - done)
                pieces.append(np.fromfile(str(shard.filename), shard.dtype, count * self.dim, offset=shard.offset
                                          + done * self.dim * shard.itemsize).reshape(count, self.dim))
                here, done = here + count, done + count
                if here == rows:
                    yield first, check_finite(np.concatenate(pieces) if len(pieces) > 1 else pieces[0], self.folder)
                    pieces, first, here = [], first + here, 0
        if here:
            yield first, check_finite(np.concatenate(pieces), self.folder)
