"""Sealed shards and neighbor lists -> batches, the interface to the model.

A batch is a dict of arrays:

| key | shape and type | content |
|---|---|---|
| image | (B, H, W, 3) uint8 | pixels; absent if the run trains on latents |
| latent | (B, C, h, w) float16 | scaled latents; absent if the run trains on pixels |
| neighbors | (B, k, D) float16 | unit vectors, zeros for missing neighbors |
| rows | (B,) int64 | global rows |
| own | (B, D) float16 | vectors of the images or of their captions, if requested |

A forgotten image is never in a batch: another row takes its place, and as a neighbor it counts as missing. A row of the
database that was hidden after the neighbor lists were made counts as missing too.
"""

from functools import partial
from typing import Any

import numpy as np

from pipeline.batches.forgotten import ForgottenRows
from pipeline.batches.images import DatasetImages, open_array, shard_numbers
from pipeline.batches.order import Order
from pipeline.batches.prefetch import Prefetcher
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.neighbors.files import has_vectors, neighbor_files
from pipeline.takedowns.hidden_rows import read_hidden_rows
from pipeline.takedowns.takedowns import read_forgotten_rows

OWN = {"image": "embeddings", "caption": "text_embeddings"}


def _refuse_below(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}\nhint: {name} = {least}")


class Batches:
    """Batches of a dataset with its neighbors in a database, for one calling thread.

    The shards of this window and the next are fetched and opened in the background. `threads` threads decode the
    images of a batch (0: one for each core, eight at most). If all decoded images of the dataset fit in
    `decoded_bytes`, they stay in memory.
    """

    def __init__(self, dataset: Dataset, database: Dataset, *, k: int, global_batch: int, seed: int,
                 rank: int = 0, world: int = 1, true_neighbors: bool = True, latents: bool = False,
                 own: str = "none", size: int = 0, decoded_bytes: int = 1 << 30, threads: int = 0) -> None:
        if global_batch < world:
            raise ValueError(f"a global batch of {global_batch} leaves some of {world} workers without a sample\n"
                             f"hint: fewer workers, or a larger global batch")
        for name, value, least in (("k", k, 1), ("size", size, 0), ("seed", seed, 0)):
            _refuse_below(name, value, least)
        records = dataset.manifest("shards")["items"]
        counts = tuple(record["samples"] for record in records)
        self.dataset, self.k = dataset, k
        self.order = Order(counts, global_batch, seed)
        self.offsets = np.cumsum([0, *counts])
        self.mine = slice(rank * global_batch // world, (rank + 1) * global_batch // world)
        # A control experiment: each sample gets the neighbors of another one, so they carry no information.
        self.shift = 0 if true_neighbors else int(self.offsets[-1]) // 2
        # If the neighbor lists hold vectors, they are read in one piece with the samples.
        self.vectors = None if has_vectors(dataset, database) else Embeddings(database)
        self.lists = self._lists(database, ".ids.npy" if self.vectors else ".vectors.npy")
        self.forgotten = ForgottenRows(dataset, self.offsets)
        self.hidden_neighbors = self._hidden_neighbors(database)
        self.ids = (self._lists(database, ".ids.npy")
                    if self.vectors is None and len(self.hidden_neighbors) else self.lists)
        self.own = Embeddings(dataset, OWN[own]) if own != "none" else None
        self.latents = self._latents() if latents else None
        self.pictures = None if latents else DatasetImages(dataset, size, decoded_bytes, threads)
        self._opened = range(0)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """This rank's contiguous part of the global batch of `step`. Some ranks have one more if it does not divide."""
        _refuse_below("step", step, 0)
        self._look_ahead(step)
        rows = self.forgotten.replace(self.order.rows(step)[self.mine])
        batch = {"image": self.pictures.rows(rows)} if self.pictures else {"latent": self._sample_latents(rows, step)}
        batch |= {"rows": rows, "neighbors": self._neighbors((rows + self.shift) % self.offsets[-1])}
        return batch | ({"own": self.own.rows(rows)} if self.own else {})

    def _lists(self, database: Dataset, suffix: str) -> Prefetcher[np.ndarray]:
        """The neighbors of each shard: their rows or their vectors."""
        name = f"neighbors/{database.label}"
        records = self.dataset.manifest(name)["items"]
        lists = self._arrays(name, neighbor_files(records, suffix), records)
        if (stored := lists[0].shape[1]) < self.k:
            raise ValueError(f"k = {self.k} neighbors wanted, {self.dataset.label} has {stored} stored of each "
                             f"sample\nhint: a smaller --k, or python -m jobs neighbors "
                             f"{self.dataset.name_in_commands} --database {database.name_in_commands} "
                             f"--k {self.k} --overwrite")
        return lists

    def _hidden_neighbors(self, database: Dataset) -> np.ndarray:
        """The rows of the database that were forgotten, or hidden since its neighbor lists were made, ascending."""
        if "tombstones" in self.dataset.manifest(f"neighbors/{database.label}").get("inputs", {}):
            return read_forgotten_rows(database)
        return read_hidden_rows(database)

    def _latents(self) -> Prefetcher[np.ndarray]:
        records = self.dataset.manifest("latents")["items"]
        return self._arrays("latents", neighbor_files(records, ".npy"), records)

    def _arrays(self, name: str, files: list[dict[str, Any]], records: Any) -> Prefetcher[np.ndarray]:
        """The files of a stage with a row for each sample, one for each shard."""
        wrong = (f"shards and {name.partition('/')[0]} of {self.dataset.label} have different samples\n"
                 f"hint: {self.dataset.command(name)} --overwrite")
        if len(files) != len(self.order.counts) or sum(record["samples"] for record in records) != self.offsets[-1]:
            raise ValueError(wrong)
        return Prefetcher(partial(open_array, self.dataset, name, files, self.order.counts, wrong))

    def _look_ahead(self, step: int) -> None:
        """Open the shards of a step and of the window after it. Forget all others."""
        first, last = step * self.order.global_batch, (step + 1) * self.order.global_batch - 1
        if first in self._opened and last in self._opened:
            return
        self._opened, shards = self.order.ahead(first, last)
        if self.latents:
            self.latents.want(shards)
        if self.pictures:
            self.pictures.want(shards)
        for lists in (self.lists, self.ids):  # the second call changes nothing if both are one
            lists.want(self._shifted(shards) if self.shift else shards)

    def _shifted(self, shards: list[int]) -> list[int]:
        """The shards that hold the shifted neighbors of the samples of `shards`."""
        rows = np.concatenate([np.arange(self.offsets[shard], self.offsets[shard + 1]) for shard in shards])
        neighbor_shards = shard_numbers(self.offsets, (rows + self.shift) % self.offsets[-1])
        _, first = np.unique(neighbor_shards, return_index=True)
        return neighbor_shards[np.sort(first)].tolist()

    def _neighbors(self, rows: np.ndarray) -> np.ndarray:
        places = self._places(rows)
        neighbors = self._stack(self.lists, places)
        if len(self.hidden_neighbors):
            ids = neighbors if self.vectors else self._stack(self.ids, places)
            places_of_ids = np.searchsorted(self.hidden_neighbors[:-1], ids)  # np.isin sorts all of them each time
            neighbors[self.hidden_neighbors[places_of_ids] == ids] = -1 if self.vectors else 0
        return self.vectors.rows(neighbors) if self.vectors else neighbors

    def _stack(self, lists: Prefetcher[np.ndarray], places: list[tuple[int, int]]) -> np.ndarray:
        """The entries of the k nearest neighbors at these places, (B, k) or (B, k, D)."""
        return np.stack([lists[shard][position][:self.k] for shard, position in places])

    def _sample_latents(self, rows: np.ndarray, step: int) -> np.ndarray:
        """A latent of each row. The choice of its augmentation depends only on the step and the place in the batch."""
        assert self.latents is not None
        latents, places = self.latents, self._places(rows)
        kinds = np.random.default_rng((self.order.seed, 31, step)).integers(
            latents[places[0][0]].shape[1], size=self.order.global_batch)[self.mine]
        return np.stack([latents[shard][position, kind]
                         for (shard, position), kind in zip(places, kinds, strict=True)])

    def _places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The shard and the position in it of each global row."""
        shards = shard_numbers(self.offsets, rows)
        return list(zip(shards.tolist(), (rows - self.offsets[shards]).tolist(), strict=True))
