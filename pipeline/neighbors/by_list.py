"""Compare each query with the inverted lists nearest to it."""

from collections.abc import Callable, Iterator

import numpy as np

from pipeline.hardware import malloc
from pipeline.neighbors.rank import NEAREST_LISTS, PRODUCT_ERROR, BestRows, Candidates
from pipeline.stages.timers import Times

_ReadLists = Callable[[np.ndarray], Iterator[tuple[int, np.ndarray, np.ndarray]]]


def search_by_list(vectors: np.ndarray, probes: np.ndarray, lists: _ReadLists, m: int, times: Times | None = None
                   ) -> Candidates:
    """The m best for each of (Q, D) float32 queries, of the rows in the lists `probes` (Q, P) of each.

    `lists` yields (list, row ids (n,), vectors (n, D)) for some lists, in their order. A list is read once for all
    queries that search it. The lists nearest to a query come first: they set the score that later rows must beat.
    Times are those of exhaustive.py.
    """
    import torch

    times = times or Times()
    malloc.keep_freed_memory()
    queries, best, rows = torch.from_numpy(vectors), BestRows(len(vectors), m), torch.empty(0)
    for part, first in ((probes[:, :NEAREST_LISTS], True), (probes[:, NEAREST_LISTS:], False)):
        if not part.size:
            continue
        order = np.argsort(part, axis=None, kind="stable")
        wanted, starts = np.unique(part.ravel()[order], return_index=True)
        places = dict(zip(wanted.tolist(), np.split(order, starts[1:]), strict=True))
        for number, ids, stored in times.each("read", lists(wanted[wanted >= 0])):
            if not len(ids):
                continue
            with times("read"):
                # numpy needs ten times as long from half to single precision. New memory is slow.
                rows = torch.empty(stored.shape) if len(stored) > len(rows) else rows
                list_rows = rows[:len(stored)].copy_(torch.from_numpy(stored))
            with times("products"):
                which, rank = (torch.from_numpy(indices) for indices in np.divmod(places[number], part.shape[1]))
                products = queries[which] @ list_rows.T
            with times("choose"):
                if first:
                    best.start(which, rank, torch.from_numpy(ids), products)
                else:
                    best.add(which, torch.from_numpy(ids), products)
        with times("choose"):
            best.choose(slice(None))
    return Candidates(best.ids[:, :m].numpy(), best.scores[:, :m].numpy(), PRODUCT_ERROR["float32"])


def bytes_per_query(m: int) -> int:
    """Bytes that `search_by_list` holds for each query with m candidates."""
    return 2 * m * 12 + m * 24
