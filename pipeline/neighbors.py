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
from pipeline import embed, stage
from pipeline.dataset import Dataset, Embeddings
from pipeline.index import Searcher, best, ranked
from pipeline.stage import Item, Output, Stage

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

    def plan(self) -> list[Item]:
        embed.same_encoder(self.dataset, self.database)
        inputs = self.inputs()
        made_from = stage.digest([inputs.get(name) for name in ("database", "database_shards", "index")])
        shards = {record["id"]: record for record in self.dataset.manifest("shards")["items"]}
        items, offset = [], 0
        for record in self.dataset.manifest("embeddings")["items"]:
            # Only what the item needs: a worker that opened all embeddings would fetch them all.
            items.append(Item(record["id"], {"offset": offset, "shard": shards[record["id"]], "embeddings": record,
                                             "database": made_from}))
            offset += record["samples"]
        return items

    def process(self, item: Item, scratch: Path) -> Output:
        database, hashes = _opened(self.database, self.config.method, item.inputs["database"])
        own = self.dataset.fetch("embeddings", datasets.file_of(item.inputs["embeddings"], ".npy"))
        queries = datasets.finite(np.load(own, allow_pickle=False).astype(np.float32), str(own))
        mine = np.array([bytes.fromhex(row["sha256"]) for row in
                         datasets.metadata(self.dataset, item.inputs["shard"], ["sha256"])], dtype="S32")
        if len(mine) != len(queries):
            raise ValueError(f"{own} has {len(queries)} rows, its shard {len(mine)} samples\n"
                             f"hint: python -m jobs verify")
        dim = (database if isinstance(database, Embeddings) else database.embeddings).dim
        if queries.shape[1] != dim:
            raise ValueError(f"{own} has vectors of {queries.shape[1]} numbers, the database {self.database.label} of "
                             f"{dim}\nhint: python -m jobs verify")
        self_ids = (item.inputs["offset"] + np.arange(len(queries)) if self.dataset == self.database
                    else np.full(len(queries), -1))
        ids = np.full((len(queries), self.config.k), -1, np.int64)
        scores = np.full(ids.shape, -np.inf, np.float32)
        for start in range(0, len(queries), _BLOCK):
            part = slice(start, start + _BLOCK)
            ids[part], scores[part] = self._block(database, hashes, queries[part], mine[part], self_ids[part])
        undecodable = ~queries.any(1)  # a row of zeros is equally near to everything
        ids[undecodable], scores[undecodable] = -1, -np.inf
        np.save(scratch / "ids.npy", ids, allow_pickle=False)
        np.save(scratch / "scores.npy", scores, allow_pickle=False)
        return Output(samples=len(queries), files={f"{item.id}.ids.npy": scratch / "ids.npy",
                                                   f"{item.id}.scores.npy": scratch / "scores.npy"},
                      info={"missing": int((ids < 0).sum()),
                            "mean_similarity": round(float(scores[ids >= 0].mean()), 4) if (ids >= 0).any() else None})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"missing": sum(record["info"]["missing"] for record in records), "k": self.config.k,
                            "database": self.database.label})

    def _block(self, database: "Searcher | Embeddings", hashes: np.ndarray, queries: np.ndarray,
               mine: np.ndarray, self_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of some samples; all rows are compared for those whose candidates copies ate up."""
        k = self.config.k
        if isinstance(database, Embeddings):
            return self._exact(database, hashes, queries, mine, self_ids)
        wanted = max(k + 1, self.config.candidates or 4 * k + 20)
        ids, scores = ranked(database.embeddings, queries, database.candidates(queries, wanted), wanted)
        ids, scores = best(ids, self._without_copies(ids, scores, hashes, mine, self_ids), k)
        # An index that looks into a few lists has no more to give, however many candidates are asked for.
        short = (ids < 0).any(1)
        if short.any():
            ids[short], scores[short] = self._exact(database.embeddings, hashes, queries[short], mine[short],
                                                    self_ids[short])
        return ids, scores

    def _exact(self, database: Embeddings, hashes: np.ndarray, queries: np.ndarray, mine: np.ndarray,
               self_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours by comparison with every row, one shard of the database in memory at a time."""
        k = self.config.k
        ids, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        for offset, shard in zip(database.offsets[:-1], database.shards, strict=True):
            vectors = datasets.finite(np.asarray(shard, np.float32), database.folder)
            here = np.broadcast_to(offset + np.arange(len(shard)), (len(queries), len(shard)))
            products = np.where(vectors.any(-1), queries @ vectors.T, -np.inf)
            found = best(here, self._without_copies(here, products, hashes, mine, self_ids), k)
            ids, scores = best(np.hstack([ids, found[0]]), np.hstack([scores, found[1]]), k)
        return ids, scores

    def _without_copies(self, ids: np.ndarray, scores: np.ndarray, hashes: np.ndarray, mine: np.ndarray,
                        self_ids: np.ndarray) -> np.ndarray:
        copies = (ids == self_ids[:, None]) | (scores >= self.config.copy_similarity) | (hashes[ids] == mine[:, None])
        return np.where(copies, -np.inf, scores)


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
