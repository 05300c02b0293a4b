"""Sealed shards and neighbour lists -> batches, the border to the model.

A batch is a dict: image (B, H, W, 3) uint8, or latent (B, C, h, w) float16, scaled; neighbors (B, k, D) float16, unit
vectors, zeros where there is no neighbour; rows (B,) int64, global rows; when asked for, own (B, D) float16, the
vectors of the pictures themselves or of their captions.
"""

import mmap
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.ahead import Ahead
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings, map_array
from pipeline.media import tars
from pipeline.media.resize import pixels
from pipeline.media.types import BadPicture
from pipeline.neighbors.files import has_vectors, neighbor_files

OWN = {"image": "embeddings", "caption": "text_embeddings"}
_THREADS = 8  # that decode, at most
_PIECES = 4  # of a batch for each thread, for some take longer than others


@dataclass(frozen=True)
class Order:
    """Which global rows make the global batch of a step: a pure function of (seed, step).

    In every epoch the shards are shuffled, and the samples within windows of `window` shards, so
    that a reader holds one window at a time. An epoch's incomplete last batch is filled from the
    next one.
    """

    counts: tuple[int, ...]
    global_batch: int
    seed: int
    window: int = 16

    def epoch(self, number: int) -> np.ndarray:
        """All global rows in the order of one epoch, (N,) int64."""
        rng = np.random.default_rng((self.seed, 23, number))
        offsets = np.cumsum([0, *self.counts])
        shards = rng.permutation(len(self.counts))
        parts = []
        for start in range(0, len(shards), self.window):
            rows = np.concatenate([np.arange(offsets[shard], offsets[shard + 1])
                                   for shard in shards[start:start + self.window]])
            parts.append(rng.permutation(rows))
        return np.concatenate(parts)

    def windows(self, number: int) -> list[tuple[int, list[int]]]:
        """The windows of one epoch in its order: how many samples, and the shards that they are in."""
        shards = np.random.default_rng((self.seed, 23, number)).permutation(len(self.counts)).tolist()
        windows = [shards[start:start + self.window] for start in range(0, len(shards), self.window)]
        return [(sum(self.counts[shard] for shard in window), window) for window in windows]

    def ahead(self, first: int, last: int) -> tuple[range, list[int]]:
        """The windows with the positions `first` to `last` of the stream of all epochs, and the window after them.

        Their positions (without those of the window after them), and the shards of all in the order of their use.
        """
        number, shards, begin = first // sum(self.counts), [], None
        end = number * sum(self.counts)
        while True:
            for samples, window in self.windows(number):
                start, end = end, end + samples
                if end > first:
                    begin = start if begin is None else begin
                    shards += window
                    if start > last:
                        return range(begin, start), list(dict.fromkeys(shards))
            number += 1

    def rows(self, step: int) -> np.ndarray:
        """Global rows of the global batch of `step`, (global_batch,) int64."""
        total = sum(self.counts)
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        wanted = np.empty(len(positions), np.int64)
        for number in np.unique(positions // total):
            here = positions // total == number
            wanted[here] = self._epoch(int(number))[positions[here] % total]
        return wanted

    def _epoch(self, number: int) -> np.ndarray:
        # frozen, but a permutation of a million rows is not made anew for every step
        memory = self.__dict__.setdefault("_memory", OrderedDict())
        if number not in memory:
            memory[number] = self.epoch(number)
            while len(memory) > 2:
                memory.popitem(last=False)
        return memory[number]


class Batches:
    """Batches of a dataset with its neighbours in a database, to be asked for by one thread.

    Shards of this window and the next are fetched and opened in the background. Pictures are decoded when they are
    asked for, by `threads` threads (0: one for each core, eight at most); where all pictures of the dataset take
    `decoded_bytes` at most once they are decoded, they are kept so.
    """

    def __init__(self, dataset: Dataset, database: Dataset, *, k: int, global_batch: int, seed: int,
                 rank: int = 0, world: int = 1, true_neighbors: bool = True, latents: bool = False,
                 own: str = "none", size: int = 0, decoded_bytes: int = 1 << 30, threads: int = 0) -> None:
        if global_batch < world:
            raise ValueError(f"a global batch of {global_batch} leaves some of {world} workers without a sample\n"
                             f"hint: fewer workers, or a larger global batch")
        records = dataset.manifest("shards")["items"]
        counts = tuple(record["samples"] for record in records)
        self.dataset, self.k = dataset, k
        self.order = Order(counts, global_batch, seed)
        self.offsets = np.cumsum([0, *counts])
        self.mine = slice(rank * global_batch // world, (rank + 1) * global_batch // world)
        # A control: every sample gets the neighbours of another one, so they carry no information.
        self.shift = 0 if true_neighbors else int(self.offsets[-1]) // 2
        # Where the neighbours' vectors were written, they are read in one piece with the samples.
        self.vectors = None if has_vectors(dataset, database) else Embeddings(database)
        self.lists = self._lists(database)
        self.own = Embeddings(dataset, OWN[own]) if own != "none" else None
        self.latents = self._latents() if latents else None
        self.pictures = None if latents else Pictures(dataset, size, decoded_bytes, threads)
        self._opened = range(0)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """This rank's contiguous part of the global batch of `step`: one more on some ranks if it does not divide."""
        self._look_ahead(step)
        rows = self.order.rows(step)[self.mine]
        batch = {"image": self.pictures.rows(rows)} if self.pictures else {"latent": self._drawn(rows, step)}
        batch |= {"rows": rows, "neighbors": self._neighbors((rows + self.shift) % self.offsets[-1])}
        return batch | ({"own": self.own.rows(rows)} if self.own else {})

    def _lists(self, database: Dataset) -> Ahead[np.ndarray]:
        """The neighbours of each shard: their vectors where these were written, or else their rows."""
        name = f"neighbors/{database.label}"
        records = self.dataset.manifest(name)["items"]
        lists = self._arrays(name, neighbor_files(records, ".ids.npy" if self.vectors else ".vectors.npy"), records)
        if (stored := lists[0].shape[1]) < self.k:
            raise ValueError(f"k = {self.k} neighbours wanted, {self.dataset.label} has {stored} stored of each "
                             f"sample\nhint: a smaller --k, or neighbors --k {self.k}")
        return lists

    def _latents(self) -> Ahead[np.ndarray]:
        records = self.dataset.manifest("latents")["items"]
        return self._arrays("latents", neighbor_files(records, ".npy"), records)

    def _arrays(self, name: str, files: list[dict[str, Any]], records: Any) -> Ahead[np.ndarray]:
        """The files of a stage with a row for each sample, one for each shard."""
        wrong = (f"shards and {name.partition('/')[0]} of {self.dataset.label} have different samples\n"
                 f"hint: {self.dataset.command(name)} --rebuild")
        if len(files) != len(self.order.counts) or sum(record["samples"] for record in records) != self.offsets[-1]:
            raise ValueError(wrong)
        return Ahead(partial(_array, self.dataset, name, files, self.order.counts, wrong))

    def _look_ahead(self, step: int) -> None:
        """Have the shards of a step opened, and those of the window after it; forget all others."""
        first, last = step * self.order.global_batch, (step + 1) * self.order.global_batch - 1
        if first in self._opened and last in self._opened:
            return
        self._opened, shards = self.order.ahead(first, last)
        if self.latents:
            self.latents.want(shards)
        if self.pictures:
            self.pictures.want(shards)
        self.lists.want(self._shifted(shards) if self.shift else shards)

    def _shifted(self, shards: list[int]) -> list[int]:
        """The shards that the neighbours of the samples of some shards are taken from."""
        rows = np.concatenate([np.arange(self.offsets[shard], self.offsets[shard + 1]) for shard in shards])
        _, first = np.unique(found := _shards(self.offsets, (rows + self.shift) % self.offsets[-1]), return_index=True)
        return found[np.sort(first)].tolist()

    def _neighbors(self, rows: np.ndarray) -> np.ndarray:
        found = np.stack([self.lists[shard][position][:self.k] for shard, position in self._places(rows)])
        return self.vectors.rows(found) if self.vectors else found

    def _drawn(self, rows: np.ndarray, step: int) -> np.ndarray:
        """A latent of each row; which of its augmentations depends on the step and its place alone."""
        places = self._places(rows)
        kinds = np.random.default_rng((self.order.seed, 31, step)).integers(
            self.latents[places[0][0]].shape[1], size=self.order.global_batch)[self.mine]
        return np.stack([self.latents[shard][position, kind]
                         for (shard, position), kind in zip(places, kinds, strict=True)])

    def _places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Shard and row in it of global rows."""
        shards = _shards(self.offsets, rows)
        return list(zip(shards.tolist(), (rows - self.offsets[shards]).tolist(), strict=True))


class Pictures:
    """The pictures of a dataset by global row, averaged down to `size` pixels a side unless it is 0."""

    def __init__(self, dataset: Dataset, size: int, decoded_bytes: int, threads: int) -> None:
        records = dataset.manifest("shards")["items"]
        counts = [record["samples"] for record in records]
        self.folder, self.size, self.decoded_bytes = dataset.folder("shards"), size, decoded_bytes
        self.offsets = np.cumsum([0, *counts])
        self._tars = Ahead(partial(_tar, dataset, [file_of(record, ".tar") for record in records], counts))
        self._threads = threads or min(_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._stored = self._given = None  # shape of a picture as it is in the tars, and as it is asked for
        self._kept: np.ndarray | None = None  # all pictures of the dataset, if they take little
        self._missing = np.ones(self.offsets[-1], bool)  # which of them are not there yet

    def want(self, shards: list[int]) -> None:
        """Have some shards opened, the first first, and forget all others."""
        self._tars.want(shards if self._missing.any() else [])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of global rows, (B, H, W, 3) uint8."""
        if self._stored is None:
            self._learn(int(rows[0]))
        if self._kept is None:
            out = np.empty((len(rows), *self._given), np.uint8)
            self._decode(rows, out, np.arange(len(rows)))
            return out
        missing = np.unique(rows[self._missing[rows]])
        self._decode(missing, self._kept, missing)
        self._missing[missing] = False
        return self._kept[rows]

    def _learn(self, row: int) -> None:
        """Take the size of one picture for that of all, and keep all if they take little."""
        shard = int(_shards(self.offsets, row))
        picture = _decoded(self._tars[shard], row - int(self.offsets[shard]))
        self._given = averaged(picture[None], self.size).shape[1:] if self.size else picture.shape
        if np.prod(shape := (int(self.offsets[-1]), *self._given)) <= self.decoded_bytes:
            self._kept = np.empty(shape, np.uint8)  # takes memory as it is filled
        self._stored = picture.shape

    def _decode(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Decode the pictures of `rows` to their `places` in `out`."""
        if not len(rows):
            return
        shards = _shards(self.offsets, rows)
        positions = rows - self.offsets[shards]
        tars_ = {shard: self._tars[shard] for shard in np.unique(shards).tolist()}

        def piece(which: np.ndarray) -> None:
            for one in which.tolist():
                out[places[one]] = self._picture(tars_[int(shards[one])], int(positions[one]))

        # In the order of the tars, so that these are read forwards.
        pieces = np.array_split(np.argsort(rows, kind="stable"), min(len(rows), _PIECES * self._threads))
        for _ in self._pool.map(piece, pieces):
            pass

    def _picture(self, tar: tars.Pictures, position: int) -> np.ndarray:
        picture = _decoded(tar, position)
        if picture.shape != self._stored:
            raise ValueError(f"the pictures in {self.folder} have different sizes; training needs one size\n"
                             f"hint: shard with --resize center_crop")
        return averaged(picture[None], self.size)[0] if self.size else picture


def _shards(offsets: np.ndarray, rows: Any) -> Any:
    """The numbers of the shards that global rows are in."""
    return np.searchsorted(offsets, rows, side="right") - 1


def _tar(dataset: Dataset, files: list[dict[str, Any]], counts: list[int], number: int) -> tars.Pictures:
    """The tar of a shard; ValueError if it has not the samples of the manifest."""
    tar = dataset.opened("shards", files[number], tars.Pictures)
    if len(tar) != counts[number]:
        raise ValueError(f"{tar.path} has {len(tar)} samples, its manifest says {counts[number]}\n"
                         f"hint: python -m jobs verify")
    return tar


def _array(dataset: Dataset, name: str, files: list[dict[str, Any]], counts: tuple[int, ...], wrong: str,
           number: int) -> np.ndarray:
    """The array of a shard; ValueError saying what is `wrong` if it has not a row for each sample."""
    array = dataset.opened(name, files[number], map_array)
    if len(array) != counts[number]:
        raise ValueError(wrong)
    if len(array) and hasattr(mmap, "MADV_WILLNEED"):
        # From the first byte to the last and ahead: what is asked for later comes in no order.
        array._mmap.madvise(mmap.MADV_WILLNEED)
    return array


def _decoded(tar: tars.Pictures, position: int) -> np.ndarray:
    try:
        return pixels(tar[position])
    except BadPicture as error:
        raise ValueError(f"sample {position} of {tar.path} does not decode ({error})\n"
                         f"hint: shard these tars anew without --adopt, which leaves such samples out") from error


def averaged(pictures: np.ndarray, size: int) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 with the means of their squares in place of these, (N, size, size, 3) uint8.

    ValueError unless both sides are the same multiple of `size`.
    """
    height, width = pictures.shape[1:3]
    if height != width or height % size:
        raise ValueError(f"pictures of {width} x {height} cannot be averaged to {size} x {size}\n"
                         f"hint: --image-size must divide their sides, and these must be equal")
    step = height // size
    if step == 1:
        return pictures
    sums = pictures.reshape(len(pictures), size, step, size, step, 3).sum((2, 4), dtype=np.uint32)
    return ((sums + step * step // 2) // (step * step)).astype(np.uint8)
