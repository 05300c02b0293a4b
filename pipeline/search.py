"""The nearest rows of many queries at once: blocks of vectors against blocks of queries, or list by list.

Both find more rows than are wanted, by products that are quick and a little off, and leave it to `settle` to leave out
copies and to rank what is left by float32 products that do not depend on what else was searched.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.datasets.embeddings import Embeddings
from pipeline.hardware import devices, malloc
from pipeline.indices.searcher import best
from pipeline.stages.timers import Times

if TYPE_CHECKING:
    import torch

_GROUP = 32  # rows of which only the best score is looked at first
_PAIRS = 1 << 14  # exact products made at a time
_NEAREST = 2  # lists of a query that are looked into first
LARGEST = {"cpu": 8192, "cuda": 1 << 18}  # rows of a block, at most
# How far a product of two unit vectors may be off: the rounding of both vectors and of the result.
_OFF = {"bfloat16": 2 ** -8 + 2 ** -9, "float16": 2e-3, "float32": 1e-5}


@dataclass
class Found:
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
    """What rows must not share with a query, and which must not be found."""

    labels: np.ndarray
    """(N, L) uint64 of the database: rows with the same number in a column show the same picture."""
    similarity: float
    """Rows at least so similar are copies."""
    hashes: np.ndarray | None = None
    """(N,) uint64 perceptual hashes of the database."""
    bits: int = -1
    """Rows whose perceptual hashes differ in no more bits are copies; -1: they do not count."""
    gone: np.ndarray | None = None
    """(N,) bool: rows that must not be found at all."""

    def among(self, ids: np.ndarray, queries: "Queries", which: np.ndarray) -> np.ndarray:
        """(P,) whether the rows `ids` (P,) are the queries `which` (P,) themselves or show their pictures."""
        same = ids == queries.own[which]
        for column in range(self.labels.shape[1]):
            same |= self.labels[ids, column] == queries.labels[which, column]
        if self.gone is not None:
            same |= self.gone[ids]
        if self.hashes is not None and self.bits >= 0:
            assert queries.hashes is not None
            same |= _differing_bits(self.hashes[ids], queries.hashes[which]) <= self.bits
        return same


@dataclass
class Queries:
    """Vectors whose neighbours are wanted, and what is known of the pictures."""

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

    def __getitem__(self, part: np.ndarray) -> "Queries":
        return Queries(self.vectors[part], self.own[part], self.labels[part],
                       None if self.hashes is None else self.hashes[part])


def _differing_bits(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _BITS[(one ^ other)[..., None].view(np.uint8)].sum(-1)


_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def exhaustive(vectors: np.ndarray, database: Embeddings, m: int, memory: int, times: Times | None = None) -> Found:
    """The m best of all rows for each of (Q, D) float32 queries, by matrix products in half precision.

    `memory`: bytes for the blocks. After out of memory the search starts again with half of them, then with half of
    the queries. Times: `read` grows with the rows, `products` with rows times queries, and `choose` with the queries,
    because few rows are chosen once the best were found.
    """
    times = times or Times()
    while True:
        most = min(memory, blocks_fit.most or memory)
        at_once = min(len(vectors), queries_fit.most or len(vectors)) or 1
        try:
            return _joined_queries([_exhaustive(vectors[start:start + at_once], database, m, most, times)
                                    for start in range(0, len(vectors), at_once)])
        except RuntimeError as error:
            if devices.kind_of(error) != "out of memory":
                raise
            text = str(error).splitlines()[0]
        # After the handler: while it runs, the traceback keeps the tensors of the failed search.
        blocks = Blocks(at_once, database.dim, most, where()[0].type)
        if blocks.rows > _GROUP:
            blocks_fit.halve(blocks.bytes, text)
        else:
            queries_fit.halve(at_once, text)


blocks_fit = devices.Fit("block (in bytes)")  # of this process: it has one device
queries_fit = devices.Fit("number of queries")


def halved() -> dict[str, str]:
    """An entry of `Output.times` if this process halved its blocks or queries after out of memory."""
    notes = [note for fit in (blocks_fit, queries_fit) for note in fit.times().values()]
    return {devices.HALVED: "; ".join(notes)} if notes else {}


def _joined_queries(parts: list[Found]) -> Found:
    return parts[0] if len(parts) == 1 else Found(np.concatenate([part.ids for part in parts]),
                                                  np.concatenate([part.scores for part in parts]), parts[0].off)


def _exhaustive(vectors: np.ndarray, database: Embeddings, m: int, memory: int, times: Times) -> Found:
    import torch

    device, dtype = where()
    blocks = Blocks(len(vectors), database.dim, memory, device.type)
    queries = torch.from_numpy(vectors).to(device, dtype)
    ids = torch.full((len(vectors), m), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(vectors), m), -torch.inf, device=device)
    for first, rows in times.each("read", database.blocks(blocks.rows)):
        with times("read"):
            there = np.flatnonzero(rows.any(1))  # rows of zeros are pictures that did not decode
            if not len(there):
                continue
            count = len(there)
            padded = np.zeros((-(-count // _GROUP) * _GROUP, database.dim), np.float16)
            padded[:count] = rows if len(there) == len(rows) else rows[there]
            block = torch.from_numpy(padded).to(device, dtype)
            numbers = torch.from_numpy(there + first).to(device)
        for start in range(0, len(vectors), blocks.queries):
            part = slice(start, start + blocks.queries)
            with times("products"):
                products = torch.mm(block, queries[part].T)
                promising = _promising(products, scores[part, -1])
            with times("choose"):
                ids[part], scores[part] = _joined(products, promising, count, numbers, ids[part], scores[part])
    name = str(dtype).removeprefix("torch.")
    return Found(ids.cpu().numpy(), scores.cpu().numpy(), _OFF[name])


def _promising(products: "torch.Tensor", least: "torch.Tensor") -> "torch.Tensor":
    """(H, 2) groups of rows of (R, Q) products, and queries (Q,) whose `least` score they exceed.

    A block is searched in groups of rows: hardly any has a score that matters, once some blocks were seen.
    """
    import torch

    # Compared as they are, for a cast would go over all of them: rounded down, so that nothing is missed.
    floor = least.to(products.dtype)
    return torch.nonzero(products.view(-1, _GROUP, products.shape[1]).amax(1) > torch.where(
        floor.float() > least, torch.nextafter(floor, torch.full_like(floor, -torch.inf)), floor))


def _joined(products: "torch.Tensor", promising: "torch.Tensor", count: int, numbers: "torch.Tensor",
            ids: "torch.Tensor", scores: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """The best of (Q, m) `ids` and `scores`, and of the first `count` rows of (R, Q) products, whose ids are `numbers`,
    where they are in groups that are `promising`.
    """
    import torch

    wanted = scores.shape[1]
    least = scores[:, -1]
    groups = products.view(-1, _GROUP, products.shape[1])
    if len(promising) * _GROUP > products.numel() // 4:
        products[count:] = -torch.inf
        values, places = products.topk(min(wanted, count), 0)
        values, rows = values.T.float(), numbers[places.T]
    else:
        group, query = promising.T
        values = groups[group, :, query].float()
        inside = torch.arange(_GROUP, device=products.device)
        places = group[:, None] * _GROUP + inside
        values[(places >= count) | (values <= least[query, None])] = -torch.inf
        values, rows = _by_query(values, numbers[places.clamp(max=count - 1)], query, len(least))
    every, order = torch.cat([scores, values], 1).topk(wanted, 1)
    return torch.cat([ids, rows], 1).gather(1, order), every


def _by_query(values: "torch.Tensor", rows: "torch.Tensor", query: "torch.Tensor", count: int
              ) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(H, G) values and rows of some queries as (Q, W), those of each query together, -inf and -1 for none."""
    import torch

    hit, inside = torch.nonzero(values > -torch.inf).T
    owner = query[hit]
    order = torch.argsort(owner, stable=True)
    owner = owner[order]
    amounts = torch.bincount(owner, minlength=count)
    place = torch.arange(len(owner), device=owner.device) - (amounts.cumsum(0) - amounts)[owner]
    width = int(amounts.max()) if len(owner) else 0
    spread = torch.full((count, width), -torch.inf, device=values.device)
    spread_rows = torch.full((count, width), -1, dtype=torch.int64, device=values.device)
    spread[owner, place] = values[hit, inside][order]
    spread_rows[owner, place] = rows[hit, inside][order]
    return spread, spread_rows


@dataclass
class Blocks:
    """How many rows and queries are multiplied at a time: (rows, queries), from the bytes there are."""

    rows: int
    queries: int
    bytes: int
    """Memory of a block; above `memory` only if the smallest block is."""

    def __init__(self, queries: int, dim: int, memory: int, device: str) -> None:
        largest = 4096 if device == "cpu" else 16384
        self.queries = max(1, min(queries, largest))
        # A block in its two precisions, and its products with their maxima and what is chosen.
        row = dim * 6 + self.queries * 4
        self.rows = int(np.clip(memory // row // _GROUP * _GROUP, _GROUP, LARGEST[device]))
        self.bytes = self.rows * row


def where() -> tuple["torch.device", "torch.dtype"]:
    """The device and the precision in which it multiplies fastest: float16 as stored on a GPU."""
    import torch

    from pipeline.embeddings.clip import fastest_precision

    device = devices.choose()
    if device.type == "cuda":
        return device, torch.float16
    return device, torch.bfloat16 if fastest_precision(device) == "bf16" else torch.float32


_ReadLists = Callable[[np.ndarray], Iterator[tuple[int, np.ndarray, np.ndarray]]]


def by_list(vectors: np.ndarray, probes: np.ndarray, lists: _ReadLists, m: int, times: Times | None = None) -> Found:
    """The m best for each of (Q, D) float32 queries, of the rows in the lists `probes` (Q, P) of each.

    `lists` gives (list, row ids (n,), vectors (n, D)) for some lists, in their order. A list is read for all queries
    that look into it, and multiplied by all of them: once for those to which it is among the nearest, and once more for
    the others, who by then know what to beat. Times are those of `exhaustive`.
    """
    import torch

    times = times or Times()
    malloc.keep()
    queries, best_, rows = torch.from_numpy(vectors), _Best(len(vectors), m), torch.empty(0)
    for part, first in ((probes[:, :_NEAREST], True), (probes[:, _NEAREST:], False)):
        if not part.size:
            continue
        order = np.argsort(part, axis=None, kind="stable")
        wanted, starts = np.unique(part.ravel()[order], return_index=True)
        places = dict(zip(wanted.tolist(), np.split(order, starts[1:]), strict=True))
        for number, ids, stored in times.each("read", lists(wanted[wanted >= 0])):
            if not len(ids):
                continue
            with times("read"):
                # numpy takes ten times as long from half to single precision, and new memory is slow.
                rows = torch.empty(stored.shape) if len(stored) > len(rows) else rows
                list_ = rows[:len(stored)].copy_(torch.from_numpy(stored))
            with times("products"):
                which, rank = (torch.from_numpy(one) for one in np.divmod(places[number], part.shape[1]))
                products = queries[which] @ list_.T
            with times("choose"):
                if first:
                    best_.start(which, rank, torch.from_numpy(ids), products)
                else:
                    best_.add(which, torch.from_numpy(ids), products)
        with times("choose"):
            best_.choose(slice(None))
    return Found(best_.ids[:, :m].numpy(), best_.scores[:, :m].numpy(), _OFF["float32"])


def bytes_of_a_query(m: int) -> int:
    """What `by_list` holds for each query, whose m best rows are wanted."""
    return 2 * m * 12 + m * 24


class _Best:
    """The m best rows of each query, of rows that come a few at a time.

    What beats the least of the best is put behind them, and only where the room for it is used up are the best chosen
    anew: of the rows that come late hardly any does.
    """

    def __init__(self, queries: int, m: int) -> None:
        import torch

        self.m = m
        self.ids = torch.full((queries, _NEAREST * m), -1, dtype=torch.int64)
        self.scores = torch.full(self.ids.shape, -torch.inf)
        self.filled = torch.zeros(queries, dtype=torch.int64)
        self.least = torch.full((queries,), -torch.inf)

    def start(self, which: "torch.Tensor", rank: "torch.Tensor", ids: "torch.Tensor", products: "torch.Tensor") -> None:
        """Rows `ids` (n,) of the list that is the `rank`-th (q,) nearest of the queries `which` (q,), by their products
        (q, n); before any are added, and to be chosen from when all are there.
        """
        count = min(self.m, len(ids))
        values, rows = products.topk(count, 1)
        self.scores.view(len(self.scores), _NEAREST, self.m)[which, rank, :count] = values
        self.ids.view(len(self.scores), _NEAREST, self.m)[which, rank, :count] = ids[rows]

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
        self.scores[which], self.ids[which] = (torch.nn.functional.pad(one, (0, room), value=nothing)
                                               for one, nothing in ((scores, -torch.inf), (ids, -1)))
        self.filled[which] = (scores > -torch.inf).sum(1)
        self.least[which] = scores[:, -1]


def settle(found: Found, queries: Queries, database: Embeddings, copies: Copies, k: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows that are no copies, of those that were found: ids (Q, k) and exact scores (Q, k)."""
    ids, rough = found.ids.copy(), found.scores.copy()
    which, place = np.nonzero(ids >= 0)
    gone = copies.among(ids[which, place], queries, which)
    rough[which[gone], place[gone]] = -np.inf
    # What is a copy for sure needs no exact product, nor what comes after k that are none for sure.
    rough[rough >= copies.similarity + found.off] = -np.inf
    sure = np.where(rough < copies.similarity - found.off, rough, -np.inf)
    if sure.shape[1] > k:
        least = -np.partition(-sure, k - 1, axis=1)[:, k - 1] - 2 * found.off
        rough[rough < least[:, None]] = -np.inf
    which, place = np.nonzero(rough > -np.inf)
    scores = np.full(rough.shape, -np.inf, np.float32)
    scores[which, place] = products(database, ids[which, place], queries.vectors, which)
    scores[scores >= copies.similarity] = -np.inf
    return best(ids, scores, k)


def products(database: Embeddings, ids: np.ndarray, vectors: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(P,) float32 inner products of the rows `ids` (P,) with the queries `which` (P,) of (Q, D), each for itself."""
    import torch

    scores = np.empty(len(ids), np.float32)
    order = np.argsort(ids, kind="stable")  # so that what lies together is read together

    def some(start: int) -> None:
        part = order[start:start + _PAIRS]
        rows = torch.from_numpy(database.rows(ids[part], once=True)).float().numpy()
        # Rows of zeros are pictures that did not decode.
        scores[part] = np.where(rows.any(1), np.einsum("pd,pd->p", rows, vectors[which[part]]), -np.inf)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(some, range(0, len(ids), _PAIRS)))
    return scores


def masked(queries: Queries, database: Embeddings, copies: Copies, k: int, memory: int
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
        which, place = np.nonzero(abs(here - copies.similarity) < _OFF["float32"])
        here[which, place] = products(database, first + place, queries.vectors, which)
        every = np.broadcast_to(first + np.arange(len(rows)), here.shape)
        # A few more than k: the products of a block are not to the last bit those that rank.
        found = best(every, np.where(here >= copies.similarity, -np.inf, here), k + 8)
        ids, scores = best(np.hstack([ids, found[0]]), np.hstack([scores, found[1]]), k + 8)
    which, place = np.nonzero(ids >= 0)
    scores[which, place] = products(database, ids[which, place], queries.vectors, which)
    scores[scores >= copies.similarity] = -np.inf
    return best(ids, scores, k)
