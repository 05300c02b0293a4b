"""Sealed shards and neighbour lists -> batches, the border to the model.

A batch is a dict: image (B, H, W, 3) uint8, or latent (B, C, h, w) float16, scaled; neighbors (B, k, D) float16, unit
vectors, zeros where there is no neighbour; rows (B,) int64, global rows; when asked for, own (B, D) float16, the
vectors of the pictures themselves or of their captions.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import images, neighbors, tars
from pipeline.dataset import Dataset, Embeddings, file_of

OWN = {"image": "embeddings", "caption": "text_embeddings"}


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
    """Batches of a dataset with its neighbours in a database; holds decoded shards of the current window."""

    def __init__(self, dataset: Dataset, database: Dataset, *, k: int, global_batch: int, seed: int,
                 rank: int = 0, world: int = 1, true_neighbors: bool = True, latents: bool = False,
                 own: str = "none", size: int = 0) -> None:
        self.dataset = dataset
        self.shards = dataset.manifest("shards")["items"]
        self.ids = neighbors.load(dataset, database)
        # Where the neighbours' vectors were written, they are read in one piece with the samples.
        self.written = neighbors.load(dataset, database, ".vectors.npy") if neighbors.written(dataset, database) else []
        self.vectors = None if self.written else Embeddings(database)
        stored = self.ids[0].shape[1]
        if k > stored:
            raise ValueError(f"k = {k} neighbours wanted, {dataset.label} has {stored} stored of each sample\n"
                             f"hint: a smaller --k, or neighbors --k {k}")
        if global_batch % world:
            raise ValueError(f"a global batch of {global_batch} does not divide among {world} workers")
        counts = tuple(record["samples"] for record in self.shards)
        if tuple(len(part) for part in self.ids) != counts:
            raise ValueError(f"shards and neighbours of {dataset.label} have different samples\n"
                             f"hint: {dataset.command(f'neighbors/{database.label}')} --rebuild")
        self.order = Order(counts, global_batch, seed)
        self.latents = [np.load(dataset.fetch("latents", file_of(record, ".npy")), mmap_mode="r", allow_pickle=False)
                        for record in dataset.manifest("latents")["items"]] if latents else []
        if self.latents and tuple(map(len, self.latents)) != counts:
            raise ValueError(f"shards and latents of {dataset.label} have different samples\n"
                             f"hint: {dataset.command('latents')} --rebuild")
        self.own = Embeddings(dataset, OWN[own]) if own != "none" else None
        self.offsets = np.cumsum([0, *counts])
        self.k, self.rank, self.world, self.size = k, rank, world, size
        # A control: every sample gets the neighbours of another one, so they carry no information.
        self.shift = 0 if true_neighbors else int(self.offsets[-1]) // 2
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()

    def at(self, step: int) -> dict[str, np.ndarray]:
        """This rank's contiguous part of the global batch of `step`."""
        rows = self.order.rows(step)
        size = len(rows) // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size)
        rows = rows[mine]
        own = {"own": self.own.rows(rows)} if self.own else {}
        if self.latents:
            # Which of its augmentations a sample is seen in depends on the step and its place alone.
            kinds = np.random.default_rng((self.order.seed, 31, step)).integers(
                self.latents[0].shape[1], size=self.order.global_batch)[mine]
            return {"latent": np.stack([self._latent(row, kind) for row, kind in zip(rows, kinds, strict=True)]),
                    "rows": rows, "neighbors": self._neighbors((rows + self.shift) % self.offsets[-1])} | own
        pictures = [self._picture(row) for row in rows]
        _of_one_size(pictures, self.dataset.folder("shards"))
        return {"image": np.stack(pictures), "rows": rows,
                "neighbors": self._neighbors((rows + self.shift) % self.offsets[-1])} | own

    def _where(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return shard, int(row - self.offsets[shard])

    def _neighbors(self, rows: np.ndarray) -> np.ndarray:
        kept = self.written or self.ids
        found = np.stack([kept[shard][position][:self.k] for shard, position in map(self._where, rows)])
        return self.vectors.rows(found) if self.vectors else found

    def _latent(self, row: int, kind: int) -> np.ndarray:
        shard, position = self._where(row)
        return self.latents[shard][position, kind]

    def _picture(self, row: int) -> np.ndarray:
        number, position = self._where(row)
        if number in self._decoded:
            self._decoded.move_to_end(number)
        else:
            path = self.dataset.fetch("shards", file_of(self.shards[number], ".tar"))
            self._decoded[number] = _pictures(path, self.shards[number]["samples"], self.size)
            while len(self._decoded) > 2 * self.order.window:
                self._decoded.popitem(last=False)
        return self._decoded[number][position]


def _pictures(path: Path, count: int, size: int) -> np.ndarray:
    """All pictures of a tar, (N, H, W, 3) uint8, averaged down to `size` pixels a side unless it is 0."""
    pictures = [images.pixels(tars.picture(sample)) for sample in tars.read(path)]
    if len(pictures) != count:
        raise ValueError(f"{path} has {len(pictures)} samples, its manifest says {count}\nhint: python -m jobs verify")
    _of_one_size(pictures, path)
    return averaged(np.stack(pictures), size) if size else np.stack(pictures)


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


def _of_one_size(pictures: list[np.ndarray], where: Path | str) -> None:
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"the pictures in {where} have different sizes; training needs one size\n"
                         f"hint: shard with --resize center_crop")
