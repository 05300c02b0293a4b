"""Measure recall, and choose the search effort."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.choose import budget_bytes
from pipeline.indices.config import BLOCK, EXACT, FLAT_GAIN, IndexConfig
from pipeline.indices.faiss_door import (
    count_gpus,
    faiss,
    gpu_resources,
    inner_index,
    nearest_lists,
    search_in_blocks,
    untyped_faiss,
    use_one_thread,
)
from pipeline.indices.searcher import best_rows


@dataclass
class RecallQueries:
    """Queries of one kind, and the exact neighbors of each among the rows that were looked at."""

    kind: str
    vectors: np.ndarray
    """(Q, D) float32"""
    own: np.ndarray | None = None
    """(Q,) the row that each query is, which is no answer to it; None if they are no rows."""
    ids: np.ndarray = field(init=False)
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.ids = np.full((len(self.vectors), EXACT), -1, np.int64)
        self.scores = np.full((len(self.vectors), EXACT), -np.inf, np.float32)

    def look(self, vectors: np.ndarray, offset: int) -> None:
        """Take rows (N, D) float32 into account, which begin at the global row `offset`."""
        rows = np.flatnonzero(vectors.any(1))  # rows of zeros are images that did not decode
        if not len(rows) or not len(self.vectors):
            return
        decoded = vectors if len(rows) == len(vectors) else vectors[rows]
        arguments = self.vectors, np.ascontiguousarray(decoded), min(EXACT + 1, len(decoded))
        if count_gpus():
            scores, places = faiss.knn_gpu(gpu_resources(), *arguments, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, places = search_in_blocks(
                lambda queries: faiss.knn(queries, *arguments[1:], metric=faiss.METRIC_INNER_PRODUCT), self.vectors)
        ids = rows[places] + offset
        if self.own is not None:
            scores[ids == self.own[:, None]] = -np.inf
        self.ids, self.scores = best_rows(np.hstack([self.ids, ids]), np.hstack([self.scores, scores]), EXACT)

    def recall(self, index: faiss.Index) -> dict[str, float]:
        """recall@1, @10 and @100 of an index: the share of the exact neighbors that are among as many found."""
        _, ids = search_in_blocks(lambda queries: index.search(queries, EXACT + 1), self.vectors)
        if self.own is not None:
            # The query itself moves to the end.
            order = np.argsort(ids == self.own[:, None], axis=1, kind="stable")
            ids = np.take_along_axis(ids, order, 1)
        result = {}
        for depth in (1, 10, 100):
            hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(self.ids[:, :depth], ids[:, :depth],
                                                                      strict=True)]
            result[str(depth)] = round(float(sum(hits) / max(1, (self.ids[:, :depth] >= 0).sum())), 4)
        return result


def held_out_rows(count: int, config: IndexConfig) -> np.ndarray:
    """The rows that are kept out of training where one worker builds the index, ascending."""
    rng = np.random.default_rng((config.seed, 17))
    return np.sort(rng.choice(count, min(config.queries, count // 10), replace=False))


def nonzero_rows(rows: np.ndarray) -> np.ndarray:
    """Without the rows of zeros, which mark images that did not decode."""
    there = rows.any(1)
    return rows if there.all() else rows[there]


def sample_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of some rows, ascending."""
    return rows if len(rows) <= count else np.sort(rng.choice(rows, max(0, count), replace=False))


def text_queries(dataset: Dataset, config: IndexConfig, rng: np.random.Generator) -> RecallQueries:
    """Captions of a dataset as queries."""
    texts = Embeddings(dataset, "text_embeddings")
    rows = nonzero_rows(texts.rows(sample_rows(np.arange(len(texts)), config.queries, rng)))
    return RecallQueries("text", rows.astype(np.float32))


def read_blocks(embeddings: Embeddings) -> Iterator[tuple[int, np.ndarray]]:
    """All rows in float32, some at a time, with the number of the first."""
    for offset, shard in zip(embeddings.offsets[:-1], embeddings.shards, strict=True):
        for start in range(0, len(shard), BLOCK):
            yield int(offset) + start, np.asarray(shard[start:start + BLOCK], np.float32)


def measure_recall(index: faiss.Index, key: str, queries: list[RecallQueries], config: IndexConfig, size: int = 0
             ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Tune a filled index. Returns index_infos of autofaiss, facts and seconds.

    The search effort is the smallest that reaches the target recall@10 of images. Captions count if there are no other
    queries. It stops earlier if more effort gains nothing.
    """
    count, dim = index.ntotal, index.d
    size = size or len(faiss.serialize_index(index))
    usable = [query_set for query_set in queries if len(query_set.vectors) and (query_set.ids[:, 9] >= 0).all()]
    curve: list[dict[str, Any]] = []
    setting, milliseconds = "", {}
    for setting in _efforts(index) if usable else [""]:
        if setting:
            untyped_faiss.ParameterSpace().set_index_parameters(index, setting)
        curve.append({"parameter": setting, **{query_set.kind: query_set.recall(index) for query_set in usable}})
        milliseconds[setting or "all"] = _latency(index, usable[0].vectors if usable else queries[0].vectors)
        recalls = [point[usable[0].kind]["10"] for point in curve] if usable else []
        if recalls and recalls[-1] >= config.target_recall:
            break
        # If the codes lose the neighbors, more effort does not find them.
        if len(recalls) > 2 and recalls[-1] - recalls[-3] < FLAT_GAIN and recalls[-1] > 0.5 * config.target_recall:
            setting = curve[-3]["parameter"]
            break
    if setting:
        untyped_faiss.ParameterSpace().set_index_parameters(index, setting)
    reached = next(point for point in curve if point["parameter"] == setting)
    recall = {query_set.kind: reached[query_set.kind] for query_set in usable}
    infos = {"index_key": key, "index_param": setting, "index_path": "knn.index", "size in bytes": size,
             "nb vectors": count, "vectors dimension": dim,
             "compression ratio": round(4.0 * count * dim / size, 4)}
    info = {"key": key, "parameter": setting, "bytes": size, "budget": budget_bytes(count, config),
            "bytes_per_vector": round(size / count, 2), "recall_at_10": recall.get("image", {}).get("10"),
            "recall": recall, "recall_queries": len(queries[0].vectors), "recall_rows": count,
            "curve": curve}
    logging.getLogger(__name__).info("index %s: %d bytes, recall@10 %s", key, size,
                                     "not measured (too few vectors)" if info["recall_at_10"] is None
                                     else info["recall_at_10"])
    # Times differ from run to run and would make equal indices look different.
    return infos, info, {"milliseconds a query": milliseconds}


def recall_error(index: faiss.Index, vectors: np.ndarray) -> float:
    """Mean squared distance of unit vectors to their form in the index. 0 if it stores whole vectors.

    For lists with whole vectors it is the distance to the center of the list.
    """
    sample = np.ascontiguousarray(vectors[:10_000], np.float32)
    if not len(sample):
        return 0.0
    inner: Any = inner_index(index)
    if isinstance(inner, untyped_faiss.IndexIVFPQFastScan):
        inner.fine_quantizer = inner.pq  # faiss 1.15 does not set it for an index from a file, and then crashes
    try:
        with use_one_thread():
            decoded = index.sa_decode(index.sa_encode(sample))
    except RuntimeError:  # a kind that has no codes
        return 0.0
    if isinstance(index, faiss.IndexIVFFlat):
        decoded = index.quantizer.reconstruct_batch(nearest_lists(index.quantizer, sample))
    return round(float(((decoded - sample) ** 2).sum(1).mean()), 6)


def _efforts(index: faiss.Index) -> Iterator[str]:
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        yield from (f"nprobe={1 << power}" for power in range(20) if 1 << power <= inner.nlist)
    elif isinstance(inner, faiss.IndexHNSW):
        yield from (f"efSearch={1 << power}" for power in range(5, 11))
    else:
        yield ""


def _latency(index: faiss.Index, queries: np.ndarray) -> dict[str, float]:
    """Milliseconds of a single query by one thread, median and 99th percentile."""
    seconds = []
    with use_one_thread():
        for query in queries[:200]:
            started = time.perf_counter()
            index.search(query[None], 10)
            seconds.append(time.perf_counter() - started)
    if not seconds:
        return {}
    return {name: round(float(np.percentile(seconds, part)) * 1e3, 4) for name, part in (("p50", 50), ("p99", 99))}
