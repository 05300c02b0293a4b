"""Exclude copies and rank candidates by exact products."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.searcher import best_rows

if TYPE_CHECKING:
    import torch

ROWS_OF_A_GROUP = 32  # rows of which only the best score is looked at first
_PAIRS = 1 << 14  # exact products made at a time
NEAREST_LISTS = 2  # lists of a query that are looked into first
# How far a product of two unit vectors may be off: the rounding of both vectors and of the result.
PRODUCT_ERROR = {"bfloat16": 2 ** -8 + 2 ** -9, "float16": 2e-3, "float32": 1e-5}


@dataclass
class Candidates:
    """The best rows of each query so far, by products that may be off by `off`."""

    ids: np.ndarray
    """(Q, m) int64, -1 for none"""
    scores: np.ndarray
    """(Q, m) float32, best first; -inf for none"""
    off: float

    @property
    def beyond(self) -> np.ndarray:
        """(Q,) what no row that is not here can exceed; -inf where every row is."""
        return self.scores[:, -1] + np.float32(self.off)


@dataclass
class Copies:
    """The rules for copies of a query, and the hidden rows."""

    labels: np.ndarray
    """(N, L) uint64 of the database: rows with the same number in a column show the same image."""
    similarity: float
    """Rows with at least this cosine are copies."""
    hashes: np.ndarray | None = None
    """(N,) uint64 perceptual hashes of the database."""
    bits: int = -1
    """Rows whose perceptual hashes differ in at most so many bits are copies. -1: ignore hashes."""
    hidden: np.ndarray | None = None
    """(N,) bool: rows that must not be found at all."""

    def among(self, ids: np.ndarray, queries: "NeighborQueries", which: np.ndarray) -> np.ndarray:
        """(P,) whether the rows `ids` (P,) are the queries `which` (P,) themselves or show their images."""
        same = ids == queries.own[which]
        for column in range(self.labels.shape[1]):
            same |= self.labels[ids, column] == queries.labels[which, column]
        if self.hidden is not None:
            same |= self.hidden[ids]
        if self.hashes is not None and self.bits >= 0:
            assert queries.hashes is not None
            same |= _differing_bits(self.hashes[ids], queries.hashes[which]) <= self.bits
        return same


@dataclass
class NeighborQueries:
    """Vectors whose neighbors are wanted, and what is known of the images."""

    vectors: np.ndarray
    """(Q, D) float32"""
    own: np.ndarray
    """(Q,) int64 row of the database that a query is, -1 if it is none"""
    labels: np.ndarray
    """(Q, L) uint64, as in `Copies`"""
    hashes: np.ndarray | None = None
    """(Q,) uint64"""

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, part: np.ndarray) -> "NeighborQueries":
        return NeighborQueries(self.vectors[part], self.own[part], self.labels[part],
                       None if self.hashes is None else self.hashes[part])


def _differing_bits(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    return _BITS[(hashes ^ others)[..., None].view(np.uint8)].sum(-1)


_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class BestRows:
    """The m best rows of each query, from rows that arrive in small groups.

    Rows that beat the m-th best are appended. The best are chosen again only when the space for them is full, because
    few of the later rows are better.
    """

    def __init__(self, queries: int, m: int) -> None:
        import torch

        self.m = m
        self.ids = torch.full((queries, NEAREST_LISTS * m), -1, dtype=torch.int64)
        self.scores = torch.full(self.ids.shape, -torch.inf)
        self.filled = torch.zeros(queries, dtype=torch.int64)
        self.least = torch.full((queries,), -torch.inf)

    def start(self, which: "torch.Tensor", rank: "torch.Tensor", ids: "torch.Tensor", products: "torch.Tensor") -> None:
        """Add rows `ids` (n,) of one list for the queries `which` (q,), by their products (q, n).

        The list is the `rank`-th (q,) nearest of each query. Candidates are chosen when all lists were added.
        """
        count = min(self.m, len(ids))
        values, rows = products.topk(count, 1)
        self.scores.view(len(self.scores), NEAREST_LISTS, self.m)[which, rank, :count] = values
        self.ids.view(len(self.scores), NEAREST_LISTS, self.m)[which, rank, :count] = ids[rows]

    def add(self, which: "torch.Tensor", ids: "torch.Tensor", products: "torch.Tensor") -> None:
        """Rows `ids` (n,) for the queries `which` (q,), by their products (q, n)."""
        import torch

        # In most lists nothing is better than what is known; to list what is takes longer.
        better = torch.nonzero(products.amax(1) > self.least[which])[:, 0]
        if not len(better):
            return
        if len(better) < len(which):
            which, products = which[better], products[better]
        query, row = torch.nonzero(products > self.least[which, None]).T
        amounts = torch.bincount(query, minlength=len(which))
        if amounts.amax() > self.m:
            row = products.topk(min(self.m, len(ids)), 1)[1]
            query, row, amounts = (torch.arange(len(which)).repeat_interleave(row.shape[1]), row.ravel(),
                                   torch.full((len(which),), row.shape[1]))
        full = self.filled[which] + amounts > self.ids.shape[1]
        if full.any():
            self.choose(which[full])
        filled = self.filled[which]
        places = torch.arange(len(query)) + (filled - amounts.cumsum(0) + amounts)[query]
        owner = which[query]
        self.ids[owner, places], self.scores[owner, places] = ids[row], products[query, row]
        self.filled[which] = filled + amounts

    def choose(self, which: "torch.Tensor | slice") -> None:
        """Keep the best of what the queries `which` have; best first."""
        import torch

        scores, places = self.scores[which].topk(self.m, 1)
        ids = self.ids[which].gather(1, places)
        room = self.ids.shape[1] - self.m
        self.scores[which], self.ids[which] = (torch.nn.functional.pad(values, (0, room), value=nothing)
                                               for values, nothing in ((scores, -torch.inf), (ids, -1)))
        self.filled[which] = (scores > -torch.inf).sum(1)
        self.least[which] = scores[:, -1]


def rank_candidates(candidates: Candidates, queries: NeighborQueries, database: Embeddings, copies: Copies, k: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates that are no copies: ids (Q, k) and exact scores (Q, k)."""
    ids, rough = candidates.ids.copy(), candidates.scores.copy()
    which, place = np.nonzero(ids >= 0)
    excluded = copies.among(ids[which, place], queries, which)
    rough[which[excluded], place[excluded]] = -np.inf
    # Certain copies need no exact product. Rows behind k certain non-copies need none either.
    rough[rough >= copies.similarity + candidates.off] = -np.inf
    sure = np.where(rough < copies.similarity - candidates.off, rough, -np.inf)
    if sure.shape[1] > k:
        least = -np.partition(-sure, k - 1, axis=1)[:, k - 1] - 2 * candidates.off
        rough[rough < least[:, None]] = -np.inf
    which, place = np.nonzero(rough > -np.inf)
    scores = np.full(rough.shape, -np.inf, np.float32)
    scores[which, place] = exact_products(database, ids[which, place], queries.vectors, which)
    scores[scores >= copies.similarity] = -np.inf
    return best_rows(ids, scores, k)


def exact_products(database: Embeddings, ids: np.ndarray, vectors: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(P,) float32 inner products of the rows `ids` (P,) with the queries `which` (P,) of (Q, D), each for itself."""
    import torch

    scores = np.empty(len(ids), np.float32)
    order = np.argsort(ids, kind="stable")  # so that what lies together is read together

    def compute(start: int) -> None:
        part = order[start:start + _PAIRS]
        rows = torch.from_numpy(database.rows(ids[part], once=True)).float().numpy()
        # Rows of zeros are images that did not decode.
        scores[part] = np.where(rows.any(1), np.einsum("pd,pd->p", rows, vectors[which[part]]), -np.inf)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(compute, range(0, len(ids), _PAIRS)))
    return scores


def search_all_rows(queries: NeighborQueries, database: Embeddings, copies: Copies, k: int, memory: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """As `settle` for all rows of the database, however many of them are copies; for few queries, for it is slow."""
    ids, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    at_once = max(1, min(len(queries), memory // (32 * 1024)))
    for first, rows in database.blocks(1024):
        vectors = rows.astype(np.float32)
        there = np.flatnonzero(vectors.any(1))
        here = np.full((len(queries), len(rows)), -np.inf, np.float32)
        for start in range(0, len(queries), at_once):
            part = np.arange(start, min(start + at_once, len(queries)))
            which, place = (index.ravel() for index in np.meshgrid(part, there, indexing="ij"))
            rough = queries.vectors[part] @ vectors[there].T
            rough[copies.among(first + place, queries, which).reshape(rough.shape)] = -np.inf
            here[np.ix_(part, there)] = rough
        # At the border of what is a copy the last bits decide.
        which, place = np.nonzero(abs(here - copies.similarity) < PRODUCT_ERROR["float32"])
        here[which, place] = exact_products(database, first + place, queries.vectors, which)
        every = np.broadcast_to(first + np.arange(len(rows)), here.shape)
        # A few more than k: the products of a block are not to the last bit those that rank.
        block_best = best_rows(every, np.where(here >= copies.similarity, -np.inf, here), k + 8)
        ids, scores = best_rows(np.hstack([ids, block_best[0]]), np.hstack([scores, block_best[1]]), k + 8)
    which, place = np.nonzero(ids >= 0)
    scores[which, place] = exact_products(database, ids[which, place], queries.vectors, which)
    scores[scores >= copies.similarity] = -np.inf
    return best_rows(ids, scores, k)
