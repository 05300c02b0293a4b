"""Compare each query with all vectors, in blocks.

faiss has an exact search too, but on a CPU it multiplies in float32 only. This one multiplies in bfloat16 where the CPU
can, and reads the vectors block by block. Its rounding error is bounded, so ranking restores the result of float32.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline import storage
from pipeline.datasets.embeddings import Embeddings
from pipeline.hardware import devices
from pipeline.neighbors.rank import PRODUCT_ERROR, ROWS_OF_A_GROUP, Candidates
from pipeline.stages.timers import Times

if TYPE_CHECKING:
    import torch
LARGEST = {"cpu": 8192, "cuda": 1 << 18}  # rows of a block, at most


def search_exhaustively(vectors: np.ndarray, database: Embeddings, m: int, memory: int, times: Times | None = None
                        ) -> Candidates:
    """The m best of all rows for each of (Q, D) float32 queries, by matrix products in half precision.

    memory: bytes for the blocks. Out of memory, the search starts again with half of them, then with half of the
    queries. Times: `read` grows with the rows, `products` with rows times queries, and `choose` with the queries.
    """
    times = times or Times()
    while True:
        most = min(memory, blocks_fit.most or memory)
        at_once = min(len(vectors), queries_fit.most or len(vectors)) or 1
        try:
            return _join_queries([_exhaustive(vectors[start:start + at_once], database, m, most, times)
                                    for start in range(0, len(vectors), at_once)])
        except RuntimeError as error:
            if devices.failure_kind(error) != "out of memory":
                raise
            text = storage.first_line(error)
        # After the handler: while it runs, the traceback keeps the tensors of the failed search.
        blocks = BlockSizes(at_once, database.dim, most, search_device()[0].type)
        if blocks.rows > ROWS_OF_A_GROUP:
            blocks_fit.halve(blocks.bytes, text)
        else:
            queries_fit.halve(at_once, text)


blocks_fit = devices.BatchFit("block (in bytes)")  # of this process: it has one device
queries_fit = devices.BatchFit("number of queries")


def halved_batches() -> dict[str, str]:
    """An entry of `Output.times` if this process halved its blocks or queries after out of memory."""
    notes = [note for fit in (blocks_fit, queries_fit) for note in fit.times().values()]
    return {devices.HALVED: "; ".join(notes)} if notes else {}


def _join_queries(parts: list[Candidates]) -> Candidates:
    return parts[0] if len(parts) == 1 else Candidates(np.concatenate([part.ids for part in parts]),
                                                  np.concatenate([part.scores for part in parts]), parts[0].off)


def _exhaustive(vectors: np.ndarray, database: Embeddings, m: int, memory: int, times: Times) -> Candidates:
    import torch

    device, dtype = search_device()
    blocks = BlockSizes(len(vectors), database.dim, memory, device.type)
    queries = torch.from_numpy(vectors).to(device, dtype)
    ids = torch.full((len(vectors), m), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(vectors), m), -torch.inf, device=device)
    for first, rows in times.each("read", database.blocks(blocks.rows)):
        with times("read"):
            there = np.flatnonzero(rows.any(1))  # rows of zeros are images that did not decode
            if not len(there):
                continue
            count = len(there)
            padded = np.zeros((-(-count // ROWS_OF_A_GROUP) * ROWS_OF_A_GROUP, database.dim), np.float16)
            padded[:count] = rows if len(there) == len(rows) else rows[there]
            block = torch.from_numpy(padded).to(device, dtype)
            numbers = torch.from_numpy(there + first).to(device)
        for start in range(0, len(vectors), blocks.queries):
            part = slice(start, start + blocks.queries)
            with times("products"):
                products = torch.mm(block, queries[part].T)
                promising = _find_promising_groups(products, scores[part, -1])
            with times("choose"):
                ids[part], scores[part] = _merge_best(products, promising, count, numbers, ids[part], scores[part])
    name = str(dtype).removeprefix("torch.")
    return Candidates(ids.cpu().numpy(), scores.cpu().numpy(), PRODUCT_ERROR[name])


def _find_promising_groups(products: "torch.Tensor", least: "torch.Tensor") -> "torch.Tensor":
    """(H, 2) groups of rows of (R, Q) products, and queries (Q,) whose `least` score they exceed.

    A block is searched in groups of rows: hardly any has a score that matters, once some blocks were seen.
    """
    import torch

    # Compared as they are, for a cast would go over all of them: rounded down, so that nothing is missed.
    floor = least.to(products.dtype)
    return torch.nonzero(products.view(-1, ROWS_OF_A_GROUP, products.shape[1]).amax(1) > torch.where(
        floor.float() > least, torch.nextafter(floor, torch.full_like(floor, -torch.inf)), floor))


def _merge_best(products: "torch.Tensor", promising: "torch.Tensor", count: int, numbers: "torch.Tensor",
            ids: "torch.Tensor", scores: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """The best of earlier candidates and of a block of rows.

    Candidates: `ids` and `scores` (Q, m). The block: the first `count` rows of products (R, Q), whose ids are
    `numbers`, as far as their groups are `promising`.
    """
    import torch

    wanted = scores.shape[1]
    least = scores[:, -1]
    groups = products.view(-1, ROWS_OF_A_GROUP, products.shape[1])
    if len(promising) * ROWS_OF_A_GROUP > products.numel() // 4:
        products[count:] = -torch.inf
        values, places = products.topk(min(wanted, count), 0)
        values, rows = values.T.float(), numbers[places.T]
    else:
        group, query = promising.T
        values = groups[group, :, query].float()
        inside = torch.arange(ROWS_OF_A_GROUP, device=products.device)
        places = group[:, None] * ROWS_OF_A_GROUP + inside
        values[(places >= count) | (values <= least[query, None])] = -torch.inf
        values, rows = _group_by_query(values, numbers[places.clamp(max=count - 1)], query, len(least))
    every, order = torch.cat([scores, values], 1).topk(wanted, 1)
    return torch.cat([ids, rows], 1).gather(1, order), every


def _group_by_query(values: "torch.Tensor", rows: "torch.Tensor", query: "torch.Tensor", count: int
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
class BlockSizes:
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
        self.rows = int(np.clip(memory // row // ROWS_OF_A_GROUP * ROWS_OF_A_GROUP, ROWS_OF_A_GROUP, LARGEST[device]))
        self.bytes = self.rows * row


def search_device() -> tuple["torch.device", "torch.dtype"]:
    """The device and the precision in which it multiplies fastest: float16 as stored on a GPU."""
    import torch

    from pipeline.embeddings.clip import fastest_precision

    device = devices.choose_device()
    if device.type == "cuda":
        return device, torch.float16
    return device, torch.bfloat16 if fastest_precision(device) == "bf16" else torch.float32
