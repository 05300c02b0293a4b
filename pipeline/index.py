"""The one door to faiss and autofaiss: embeddings -> a compressed index whose ids are global rows.

autofaiss chooses the kind of index. Around it stands what it does not do: a budget that holds
below 10,000 vectors too, training on a seeded sample instead of the first rows, and recall measured
with queries that are not in the database.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset import Dataset, Embeddings
from pipeline.stage import Item, Output, Stage, storage

if TYPE_CHECKING:
    import faiss
else:
    class _Faiss:
        """faiss, once it is needed: every command reads the settings in this file, few want its 35 MB."""

        def __getattr__(self, name: str) -> Any:
            import faiss
            return getattr(faiss, name)

    faiss = _Faiss()

_ALLOWANCE = 64 << 10
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class IndexConfig:
    """How large an index may be, and how its quality is measured."""

    max_memory: str = "4G"
    """The index may have so many bytes: a number with K, M, G or T."""
    bytes_per_vector: int = 0
    """The same per vector, whichever is less, and 64K for what does not grow with them; 0 sets no such limit."""
    key: str = ""
    """A faiss factory string instead of a choice."""
    queries: int = 1000
    """Rows held out of a trial index as queries for the recall, a tenth of all at most."""
    target_recall: float = 0.95
    """nprobe or efSearch is the least that reaches this recall@10, where the index has such a knob."""
    train_points: int = 1_000_000
    """Rows sampled to train the quantiser."""
    seed: int = 0
    """Seed of the held-out rows and the training sample."""


class Index(Stage):
    """The stage from the embeddings of a dataset to index/knn.index and index/index_infos.json."""

    name = "index"

    def __init__(self, dataset: Dataset, config: IndexConfig) -> None:
        memory(config.max_memory)
        super().__init__(dataset.root, dataset.path("index"), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return self.dataset.command("index")

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"embeddings": self.dataset.identity("embeddings")}

    def plan(self) -> list[Item]:
        return [Item("index")]

    def process(self, item: Item, scratch: Path) -> Output:
        vectors = Embeddings(self.dataset).all().astype(np.float32)
        index, infos, info = build(vectors, self.config)
        faiss.write_index(index, str(scratch / "knn.index"))
        (scratch / "index_infos.json").write_bytes(storage.json_bytes(infos))
        return Output(samples=len(vectors), info=info, files={name: scratch / name for name in
                                                              ("knn.index", "index_infos.json")})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info=records[0]["info"])


def memory(text: str) -> int:
    """Bytes of a size like 4G, 512K or 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"index.max_memory: {text!r} is not a size\nhint: a number with K, M, G or T, as in 4G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def build(vectors: np.ndarray, config: IndexConfig) -> tuple[faiss.Index, dict[str, Any], dict[str, Any]]:
    """An inner-product index over `vectors` (N, D) float32, autofaiss's index_infos, and measured facts.

    Trained and measured without the held-out rows, then filled with all rows in order. ValueError if
    no kind of index fits the budget, with the least that would do.
    """
    count, dim = vectors.shape
    if not count:
        raise ValueError("no vectors to index: not one picture of the dataset could be used")
    budget = _budget(count, config)
    rng = np.random.default_rng((config.seed, 17))
    held = np.sort(rng.choice(count, min(config.queries, count // 10), replace=False))
    kept = np.delete(np.arange(count), held)
    sample = kept if len(kept) <= config.train_points else np.sort(rng.choice(kept, config.train_points, replace=False))
    tried = []
    for key in [config.key] if config.key else _keys(count, dim, budget):
        estimate = estimated_bytes(key, count, dim)
        if not config.key and estimate > budget:
            tried.append(estimate)
            continue
        index = _trained(key, vectors[sample], dim)
        _fill(index, vectors[kept])
        knob, recall = _tuned(index, vectors, kept, held, config)
        index.reset()
        _fill(index, vectors)
        size = len(faiss.serialize_index(index)) if count < 5_000_000 else estimate
        if size <= budget:
            break
        tried.append(size)
    else:
        smallest = min(tried)
        flag = (f"--bytes-per-vector {-(-max(1, smallest - _ALLOWANCE) // count)}" if budget < memory(config.max_memory)
                else f"--max-memory {-(-smallest // 1024)}K")
        raise ValueError(f"no index of {count} vectors of {dim} fits {budget} bytes (to try again takes --rebuild)\n"
                         f"hint: the smallest possible has about {smallest} bytes: {flag}")
    speed = _latency(index, vectors[held] if len(held) else vectors[:100])
    infos = {"index_key": key, "index_param": knob, "index_path": "knn.index", "size in bytes": size,
             "nb vectors": count, "vectors dimension": dim,
             "compression ratio": round(4.0 * count * dim / size, 4)}
    info = {"key": key, "parameter": knob, "bytes": size, "budget": budget, "bytes_per_vector": round(size / count, 2),
            "recall_at_10": recall, "recall_queries": len(held), "recall_rows": len(kept)}
    # Times differ from run to run and would make equal indices look different: they go to the log.
    logging.getLogger(__name__).info("index %s: %d bytes, recall@10 %s, %.3f ms a query", key, size, recall, speed)
    return index, infos, info


def _budget(count: int, config: IndexConfig) -> int:
    """Bytes that an index of `count` vectors may have."""
    each = config.bytes_per_vector * count + _ALLOWANCE if config.bytes_per_vector else 1 << 62
    return min(memory(config.max_memory), each)


def _keys(count: int, dim: int, budget: int) -> list[str]:
    """Factory strings from the best to the smallest: autofaiss's choice, then ever shorter codes."""
    from autofaiss.external.optimize import get_optimal_index_keys_v2
    # It ignores the budget below 10,000 vectors and returns nothing for impossible ones.
    chosen = list(get_optimal_index_keys_v2(count, dim, f"{max(1, budget >> 10)}K") or [])
    ladder = ["Flat", "SQfp16", "SQ8", "SQ6", "SQ4"]
    # Of few vectors the codebooks of 8 bits are larger than the codes.
    ladder += [f"PQ{dim // step}x{bits}" for bits, least in ((8, 1000), (4, 100)) for step in (2, 4, 8, 16, 32)
               if dim % step == 0 and count >= least]
    return list(dict.fromkeys([*chosen, *ladder]))


def estimated_bytes(key: str, count: int, dim: int) -> int:
    """About how large an index of this kind will be."""
    if match := re.fullmatch(r"Flat|SQfp16|SQ(\d)|PQ(\d+)x(\d+)", key):
        if match[2]:
            return count * -(-int(match[2]) * int(match[3]) // 8) + 4 * dim * (1 << int(match[3])) + 200
        bits = {"Flat": 32, "SQfp16": 16}.get(key) or int(match[1])
        return count * -(-dim * bits // 8) + (8 * dim if match[1] else 0) + 200
    from autofaiss.external.metadata import IndexMetadata
    return int(IndexMetadata(key, count, dim).estimated_index_size_in_bytes())


def _trained(key: str, sample: np.ndarray, dim: int) -> faiss.Index:
    try:
        index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
        inner = _inner(index)
        if hasattr(inner, "do_polysemous_training"):
            # Orders the codes for a search that is not done here, at two seconds for each byte of a code.
            inner.do_polysemous_training = False
        _train_coarse_graph(index, inner, sample)
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(f"faiss cannot build {key} from {len(sample)} vectors of {dim}: {str(error).splitlines()[0]}"
                         f"\nhint: another --key, or none") from error
    return index


def _train_coarse_graph(index: faiss.Index, inner: faiss.Index, sample: np.ndarray) -> None:
    """Where lists are found through a graph, train and fill it first, as faiss would but with one thread."""
    graph = faiss.downcast_index(inner.quantizer) if isinstance(inner, faiss.IndexIVF) else None
    if not isinstance(graph, faiss.IndexHNSW):
        return
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(number))
            transform.train(sample)
            sample = transform.apply(sample)
    clustering = faiss.Clustering(inner.d, inner.nlist, inner.cp)
    clustering.train(sample, faiss.IndexFlatL2(inner.d))
    _fill(graph, faiss.vector_to_array(clustering.centroids).reshape(inner.nlist, inner.d))


def _fill(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add vectors in order; to a graph with one thread, for with more it differs from run to run."""
    threads = faiss.omp_get_max_threads()
    try:
        if isinstance(_inner(index), faiss.IndexHNSW):
            faiss.omp_set_num_threads(1)
        index.add(vectors)
    finally:
        faiss.omp_set_num_threads(threads)


def _tuned(index: faiss.Index, vectors: np.ndarray, kept: np.ndarray, held: np.ndarray,
           config: IndexConfig) -> tuple[str, float | None]:
    """Set the least search effort that reaches the target recall; the setting and the recall@10."""
    if len(held) == 0 or len(kept) < 10:
        return "", None
    _, exact = faiss.knn(vectors[held], vectors[kept], 10, metric=faiss.METRIC_INNER_PRODUCT)
    recall = 0.0
    setting = ""
    for setting in _efforts(index):
        if setting:
            faiss.ParameterSpace().set_index_parameters(index, setting)
        _, found = index.search(vectors[held], 10)
        recall = float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(exact, found, strict=True)])) / 10
        if recall >= config.target_recall:
            break
    return setting, round(recall, 4)


def _inner(index: faiss.Index) -> faiss.Index:
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _efforts(index: faiss.Index) -> Iterator[str]:
    inner = _inner(index)
    if isinstance(inner, faiss.IndexIVF):
        yield from (f"nprobe={1 << power}" for power in range(20) if 1 << power <= inner.nlist)
    elif isinstance(inner, faiss.IndexHNSW):
        yield from (f"efSearch={1 << power}" for power in range(5, 11))
    else:
        yield ""


def _latency(index: faiss.Index, queries: np.ndarray) -> float:
    started = time.perf_counter()
    for query in queries[:100]:
        index.search(query[None], 10)
    return (time.perf_counter() - started) / max(1, len(queries[:100])) * 1e3


class Searcher:
    """A database opened for search: the index finds candidates, exact vectors rank them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.manifest = dataset.manifest("index")
        entry = next(entry for record in self.manifest["items"] for entry in record["files"]
                     if entry["name"] == "knn.index")
        self.index = faiss.read_index(str(dataset.fetch("index", entry)))
        self.embeddings = Embeddings(dataset)
        if self.index.ntotal != len(self.embeddings):
            raise ValueError(f"the index of {dataset.label} has {self.index.ntotal} rows, its embeddings "
                             f"{len(self.embeddings)}\nhint: {dataset.command('index')} --rebuild")

    def __len__(self) -> int:
        return len(self.embeddings)

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Ids of about the `count` nearest rows of each query (B, D), (B, count) int64, -1 for none."""
        return self.index.search(np.ascontiguousarray(queries, np.float32), min(count, len(self)))[1]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows: ids (B, k) int64 and inner products (B, k) float32, -1 and -inf for none."""
        return ranked(self.embeddings, queries, self.candidates(queries, 4 * k + 20), k)


def ranked(embeddings: Embeddings, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of candidate `ids` (B, C) by exact inner product: ids (B, k) and scores (B, k)."""
    vectors = embeddings.rows(ids).astype(np.float32)
    scores = np.einsum("bcd,bd->bc", vectors, np.asarray(queries, np.float32), optimize=True)
    scores[(ids < 0) | ~vectors.any(-1)] = -np.inf  # rows of zeros are pictures that did not decode
    return best(ids, scores, k)


def best(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of (B, C) scores with their ids, nearest first, equal scores by id; padded by -1 and -inf."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    ids = np.where(np.isneginf(scores), -1, ids)
    short = k - ids.shape[1]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
    return ids.astype(np.int64), scores.astype(np.float32)
