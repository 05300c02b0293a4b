"""Embeddings and a database -> the k nearest database rows of every sample.

Left out of a sample's list are the sample itself and its copies: rows with the same picture
(sha256), or nearer than `copy_similarity`. With them a model would learn to copy its condition.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import dataset as datasets
from pipeline import embed
from pipeline.dataset import Dataset, Embeddings
from pipeline.index import Searcher, best, ranked
from pipeline.stage import Item, Output, Plan, Stage

_BLOCK = 1024


@dataclass(frozen=True)
class NeighborsConfig:
    """Which neighbours are kept."""

    k: int = 20
    """Neighbours of each sample."""
    method: Literal["index", "exact"] = "index"
    """index: candidates from the index, ranked by exact vectors; exact: every row compared."""
    candidates: int = 0
    """Candidates taken from the index for each sample; 0 means 4 k + 20."""
    copy_similarity: float = 0.98
    """Rows at least so similar (cosine) count as copies of the sample."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"neighbors.k must be at least 1, not {self.k}")


class Neighbors(Stage):
    """The stage from a dataset and a database to neighbors/<database>: ids and scores, (N_i, k)."""

    name = "neighbors"

    def __init__(self, dataset: Dataset, database: Dataset, config: NeighborsConfig) -> None:
        super().__init__(dataset.root, dataset.path(f"neighbors/{database.label}"), config)
        self.dataset, self.database = dataset, database

    @property
    def command(self) -> str:
        return self.dataset.command(f"neighbors/{self.database.label}")

    def inputs(self) -> dict[str, dict[str, Any]]:
        found = {"shards": self.dataset.identity("shards"), "embeddings": self.dataset.identity("embeddings"),
                 "database": self.database.identity("embeddings"), "database_shards": self.database.identity("shards")}
        if self.config.method == "index":
            found["index"] = self.database.identity("index")
        return found

    def plan(self) -> Plan:
        embed.same_encoder(self.dataset, self.database)
        return Plan([Item(record["id"], {"number": number}) for number, record in
                     enumerate(self.dataset.manifest("embeddings")["items"])])

    def setup(self) -> None:
        _opened(self.database, self.config.method, self.inputs()["database"]["digest"])

    def process(self, item: Item, scratch: Path) -> Output:
        database, hashes = _opened(self.database, self.config.method, self.inputs()["database"]["digest"])
        own = Embeddings(self.dataset)
        number = item.inputs["number"]
        queries = np.asarray(own.shards[number], np.float32)
        shards = self.dataset.manifest("shards")["items"][number]
        mine = np.array([bytes.fromhex(row["sha256"]) for row in
                         datasets.metadata(self.dataset, shards, ["sha256"])], dtype="S32")
        self_ids = (own.offsets[number] + np.arange(len(queries)) if self.dataset == self.database
                    else np.full(len(queries), -1))
        ids, scores = [], []
        for start in range(0, len(queries), _BLOCK):
            part = slice(start, start + _BLOCK)
            found = self._block(database, hashes, queries[part], mine[part], self_ids[part])
            ids.append(found[0])
            scores.append(found[1])
        np.save(scratch / "ids.npy", np.concatenate(ids), allow_pickle=False)
        np.save(scratch / "scores.npy", np.concatenate(scores), allow_pickle=False)
        every = np.concatenate(ids)
        return Output(samples=len(queries), files={f"{item.id}.ids.npy": scratch / "ids.npy",
                                                   f"{item.id}.scores.npy": scratch / "scores.npy"},
                      info={"missing": int((every < 0).sum()),
                            "mean_similarity": round(float(np.concatenate(scores)[every >= 0].mean()), 4)
                            if (every >= 0).any() else None})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"missing": sum(record["info"]["missing"] for record in records), "k": self.config.k,
                            "database": self.database.label})

    def _block(self, database: "Searcher | Embeddings", hashes: np.ndarray, queries: np.ndarray,
               mine: np.ndarray, self_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of some samples, asking for more candidates while copies eat up the list."""
        k = self.config.k
        if isinstance(database, Embeddings):
            scores = _exact(database, queries)
            ids = np.broadcast_to(np.arange(len(database)), scores.shape)
            return best(ids, self._without_copies(ids, scores, hashes, mine, self_ids), k)
        wanted = max(k + 1, self.config.candidates or 4 * k + 20)
        while True:
            ids = database.candidates(queries, wanted)
            ids, scores = ranked(database.embeddings, queries, ids, wanted)
            scores = self._without_copies(ids, scores, hashes, mine, self_ids)
            result = best(ids, scores, k)
            if wanted >= len(database) or (result[0] >= 0).all():
                return result
            wanted = min(4 * wanted, len(database))

    def _without_copies(self, ids: np.ndarray, scores: np.ndarray, hashes: np.ndarray, mine: np.ndarray,
                        self_ids: np.ndarray) -> np.ndarray:
        copies = (ids == self_ids[:, None]) | (scores >= self.config.copy_similarity) | (hashes[ids] == mine[:, None])
        return np.where(copies, -np.inf, scores)


def _exact(database: Embeddings, queries: np.ndarray) -> np.ndarray:
    """Inner products of queries (B, D) with every row, (B, N) float32; -inf for rows of zeros."""
    shards = [np.asarray(shard, np.float32) for shard in database.shards]
    return np.concatenate([np.where(shard.any(-1), queries @ shard.T, -np.inf) for shard in shards], axis=1)


@lru_cache(maxsize=1)
def _opened(database: Dataset, method: str, digest: str) -> tuple[Searcher | Embeddings, np.ndarray]:
    """The database and the hashes of its pictures, kept in this worker; `digest` tells rebuilds apart."""
    opened = Searcher(database) if method == "index" else Embeddings(database)
    return opened, datasets.content_hashes(database)


def load(dataset: Dataset, database: Dataset) -> list[np.ndarray]:
    """The ids of a sealed neighbour list, shard by shard, each (N_i, k) int64, memory-mapped."""
    name = f"neighbors/{database.label}"
    return [np.load(dataset.fetch(name, datasets.file_of(record, ".ids.npy")), mmap_mode="r", allow_pickle=False)
            for record in dataset.manifest(name)["items"]]
