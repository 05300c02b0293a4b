"""The one door to faiss and autofaiss: embeddings -> a compressed index whose ids are global rows.

autofaiss chooses the kind of index. Around it stands what it does not do: a budget that holds
below 10,000 vectors too, training on a seeded sample instead of the first rows, and recall measured
with queries that were not trained on (each without itself among the answers), and with captions.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline import storage
from pipeline.datasets import hidden_rows
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.hardware import devices
from pipeline.openmp import blocked_scans, map_blocks, one_thread
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed

if TYPE_CHECKING:
    import faiss
else:
    class _Faiss:
        """faiss, once it is needed: every command reads the settings in this file, few want its 35 MB."""

        def __getattr__(self, name: str) -> Any:
            import faiss
            return getattr(faiss, name)

    faiss = _Faiss()

BLOCK = 1 << 16  # rows in float32 at a time
_ROWS_OF_A_THREAD, _QUERIES_OF_A_THREAD = 1 << 13, 1 << 8
_PRODUCTS_FROM = 16  # numbers in a part of a code from which faiss finds its centroid by matrix products
LISTS = "knn.ivfdata"  # inverted lists that are not in knn.index
EXACT = 100  # neighbours of a query that are found exactly, to measure recall@1, @10 and @100
_ALLOWANCE = 64 << 10
_FLAT = 0.01  # less recall than this, gained by four times the effort, is not worth it
_ROWS_OF_A_LIST = 64
_ROWS_OF_CODEBOOKS = 1 << 16
_ROWS_OF_A_ROTATION, _TURNS = 1 << 15, 100
_STEADY, _STEPS = 1e-3, 26  # 1.5 to the 26th is more than 22 thousand: what is a thousandth becomes one


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
    """Rows kept out of training as queries for the recall, a tenth of all at most."""
    target_recall: float = 0.95
    """nprobe or efSearch is the least that reaches this recall@10, where the index has such a knob; or the least of
    which four times as much gains less than 0.01."""
    min_recall: float = 0.0
    """An index with less recall@10 is not sealed."""
    train_points: int = 1_000_000
    """Rows sampled to train the quantiser."""
    seed: int = 0
    """Seed of the held-out rows and the training sample."""
    part_memory: str = "512M"
    """Vectors beyond this (as float32) make an index in parts of that size, on all workers."""
    merge_memory: str = "4G"
    """Inverted lists larger than this are merged on disk, into a file that searches map into memory."""
    max_drift: float = 1.5
    """With --extend: an index that quantises the added vectors with more times the error of those that were held out
    when it was trained is not sealed."""

    def __post_init__(self) -> None:
        for name in ("max_memory", "part_memory", "merge_memory"):
            memory(getattr(self, name), name)
        for name in ("target_recall", "min_recall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"index.{name} = {getattr(self, name)}: must be within 0 and 1")
        for name in ("queries", "bytes_per_vector"):
            if getattr(self, name) < 0:
                raise ValueError(f"index.{name} = {getattr(self, name)}: must be at least 0")
        if not self.max_drift > 0:
            raise ValueError(f"index.max_drift = {self.max_drift}: must be above 0")
        if self.train_points < 1:
            raise ValueError(f"index.train_points = {self.train_points}: must be at least 1")

    def rows_of_a_part(self, dim: int) -> int:
        """Vectors of so many numbers that one part may have."""
        return max(1, memory(self.part_memory, "part_memory") // (4 * dim))


class OfAnIndex(Stage):
    """A stage on the way to an index of `dataset`."""

    dataset: Dataset

    @property
    def command(self) -> str:
        return self.dataset.command("index")

    most_gpus = 1024  # faiss uses all that it sees

    @property
    def workers_need_gpu(self) -> bool:  # type: ignore[override]
        """Whether this faiss could use one."""
        return gpus_possible()

    def check_device(self) -> None:
        gpus()

    def setup(self) -> None:
        self.precision = "fp32"
        if gpus():
            self.device = f"{devices.visible_cards()}, {self.precision}"


class Index(OfAnIndex):
    """The stage from the embeddings of a dataset to index/knn.index and index/index_infos.json."""

    name = "index"

    def __init__(self, dataset: Dataset, config: IndexConfig) -> None:
        super().__init__(dataset.root, dataset.path("index"), config)
        self.dataset = dataset

    def section(self) -> dict[str, Any]:
        section = super().section()
        if self.config.merge_memory == IndexConfig.merge_memory:
            del section["merge_memory"]  # indices from before there was a choice have the same files
        return {name: value for name, value in section.items() if name not in {"min_recall", "max_drift"}}

    def inputs(self) -> dict[str, dict[str, Any]]:
        names = ["embeddings", *(["text_embeddings"] if self.dataset.sealed("text_embeddings") else [])]
        return {name: self.dataset.identity(name) for name in names}

    def before(self) -> list[Stage]:
        """The stages that go before, where the vectors are too many for one worker; they are emptied afterwards."""
        from pipeline.assembly import Parts, Training
        manifest = self.dataset.manifest("embeddings")
        if manifest["totals"]["samples"] <= self.config.rows_of_a_part(manifest["info"]["encoder"]["dim"]):
            return []
        training = Training(self.dataset, self.config)
        return [training, Parts(training, self.config)]

    def plan(self) -> list[Item]:
        manifest = self.dataset.manifest("embeddings")
        possible(manifest["totals"]["samples"], manifest["info"]["encoder"]["dim"], self.config)
        return [Item("index")]

    def process(self, item: Item, scratch: Path) -> Output:
        if before := self.before():
            from pipeline.assembly import assemble
            index, infos, info, times, held = assemble(*before, self.config, scratch)  # type: ignore[arg-type]
        else:
            vectors = Embeddings(self.dataset).all().astype(np.float32)
            texts = Embeddings(self.dataset, "text_embeddings") if "text_embeddings" in self.inputs() else None
            index, infos, info, times = build(vectors, self.config, None if texts is None else texts.all())
            held = held_out(len(vectors), self.config)
        return self.output(index, infos, info, times, held, scratch)

    def output(self, index: faiss.Index, infos: dict[str, Any], info: dict[str, Any], times: dict[str, Any],
               held: np.ndarray, scratch: Path) -> Output:
        """The files of an index: what is searched, autofaiss's facts, and the rows (Q,) that training did not see."""
        if doubled := misnumbered(index):
            raise StageFailed(f"index: {doubled} of {index.ntotal} rows are not in it exactly once; nothing is sealed\n"
                              f"hint: this is a fault of the program or of a part: --rebuild, or other parts")
        files = written(index, scratch)
        (scratch / "index_infos.json").write_bytes(storage.json_bytes(infos))
        np.save(scratch / "held.npy", held, allow_pickle=False)
        return Output(samples=index.ntotal, info=info, times=times, files=files | {
            name: scratch / name for name in ("index_infos.json", "held.npy")})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        info = records[0]["info"]
        if info["recall_at_10"] is None and self.config.min_recall:
            raise StageFailed(f"index: of {records[0]['samples']} vectors no recall can be measured, --min-recall asks "
                              f"for {self.config.min_recall}\nhint: ten vectors for each query, or do without it")
        if info["recall_at_10"] is not None and info["recall_at_10"] < self.config.min_recall:
            raise StageFailed(f"index: recall@10 is {info['recall_at_10']}, --min-recall asks for "
                              f"{self.config.min_recall}\nhint: more memory, or another --key, and --rebuild; what was "
                              f"built ({info['key']}) is not sealed")
        return Output(info=info)


def memory(text: str, name: str = "max_memory") -> int:
    """Bytes of a size like 4G, 512K or 1000."""
    return storage.size_of(text, f"index.{name}")


@dataclass
class Queries:
    """Queries of one kind, and the exact neighbours of each among the rows that were looked at."""

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
        rows = np.flatnonzero(vectors.any(1))  # rows of zeros are pictures that did not decode
        if not len(rows) or not len(self.vectors):
            return
        some = vectors if len(rows) == len(vectors) else vectors[rows]
        asked = self.vectors, np.ascontiguousarray(some), min(EXACT + 1, len(some))
        if gpus():
            scores, found = faiss.knn_gpu(_gpu_resources(), *asked, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, found = _search(lambda queries: faiss.knn(queries, *asked[1:], metric=faiss.METRIC_INNER_PRODUCT),
                                    self.vectors)
        ids = rows[found] + offset
        if self.own is not None:
            scores[ids == self.own[:, None]] = -np.inf
        self.ids, self.scores = best(np.hstack([self.ids, ids]), np.hstack([self.scores, scores]), EXACT)

    def recall(self, index: faiss.Index) -> dict[str, float]:
        """recall@1, @10 and @100 of an index: the share of the exact neighbours that are among as many found."""
        _, found = _search(lambda queries: index.search(queries, EXACT + 1), self.vectors)
        if self.own is not None:
            # What is not the query itself moves up.
            order = np.argsort(found == self.own[:, None], axis=1, kind="stable")
            found = np.take_along_axis(found, order, 1)
        result = {}
        for depth in (1, 10, 100):
            hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(self.ids[:, :depth], found[:, :depth],
                                                                      strict=True)]
            result[str(depth)] = round(float(sum(hits) / max(1, (self.ids[:, :depth] >= 0).sum())), 4)
        return result


def build(vectors: np.ndarray, config: IndexConfig, texts: np.ndarray | None = None
          ) -> tuple[faiss.Index, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """An inner-product index over `vectors` (N, D) float32, autofaiss's index_infos, measured facts, and seconds.

    Trained without the rows that serve as queries; `texts` (M, D) are rows of other queries. ValueError if no kind of
    index fits the budget, with the least that would do.
    """
    count, dim = vectors.shape
    if not count:
        raise ValueError("no vectors to index: not one picture of the dataset could be used")
    budget = budget_of(count, config)
    held, rng = held_out(count, config), np.random.default_rng((config.seed, 18))
    kept = np.delete(np.arange(count), held)
    sample = kept if len(kept) <= config.train_points else np.sort(rng.choice(kept, config.train_points, replace=False))
    held = held[vectors[held].any(1)]
    queries = [Queries("image", vectors[held], held)]
    if texts is not None:
        there = np.flatnonzero(texts.any(1))
        chosen = np.sort(rng.choice(there, min(config.queries, len(there)), replace=False))
        queries.append(Queries("text", texts[chosen].astype(np.float32)))
    tried = []
    for key in _keys(count, dim, budget, config):
        estimate = estimated_bytes(key, count, dim)
        if not config.key and estimate > budget:
            tried.append(estimate)
            continue
        points = training_rows(key, config)
        seen = vectors[sample if len(sample) <= points else np.sort(rng.choice(sample, points, replace=False))]
        index = trained(key, seen, dim)
        error = error_of(index, vectors[held] if len(held) else seen)
        fill(index, vectors)
        size = len(faiss.serialize_index(index)) if count < 5_000_000 else estimate
        if size <= budget:
            break
        tried.append(size)
    else:
        raise _no_room(count, dim, budget, min(tried), config)
    for one in queries:
        one.look(vectors, 0)
    infos, info, times = measured(index, key, queries, config, size)
    return index, infos, info | {"error_of_held": error}, times


def possible(count: int, dim: int, config: IndexConfig) -> None:
    """ValueError if no index of so many vectors can be built with these settings, as far as can be told before."""
    if config.key:
        try:
            faiss.index_factory(dim, config.key)
        except RuntimeError:
            raise ValueError(f"faiss knows no index {config.key} of vectors of {dim} numbers\n"
                             f"hint: --key as in IVF4096_HNSW32,PQ64x8 or SQ8, or none for a choice") from None
        lists = re.search(r"IVF(\d+)", config.key)
        if lists and int(lists[1]) > count - min(config.queries, count // 10):
            raise ValueError(f"{config.key} has more lists than there are vectors to train them on, of {count}\n"
                             f"hint: another --key, or none for a choice")
    elif count:
        budget = budget_of(count, config)
        smallest = min(estimated_bytes(key, count, dim) for key in _keys(count, dim, budget, config))
        if smallest > budget:
            raise _no_room(count, dim, budget, smallest, config)


def misnumbered(index: faiss.Index) -> int:
    """How many rows are not in the lists of an index exactly once, or have a number that no row has."""
    inner = _inner(index)
    if not isinstance(inner, faiss.IndexIVF):
        return 0
    times, beyond = np.zeros(index.ntotal, np.uint8), 0
    for number in range(inner.nlist):
        if size := inner.invlists.list_size(number):
            ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), size)
            good = ids[(ids >= 0) & (ids < len(times))]
            beyond += size - len(good)
            times[good] += 1  # nobody is twice in one list, or it is missing elsewhere
    return beyond + int((times != 1).sum())


def held_out(count: int, config: IndexConfig) -> np.ndarray:
    """The rows that are kept out of training where one worker builds the index, ascending."""
    rng = np.random.default_rng((config.seed, 17))
    return np.sort(rng.choice(count, min(config.queries, count // 10), replace=False))


def choice(count: int, dim: int, config: IndexConfig) -> str:
    """The kind of an index of so many vectors that is filled in parts; ValueError if none fits the budget."""
    budget = budget_of(count, config)
    # Graphs over all rows cannot be put together from parts.
    keys = [key for key in _keys(count, dim, budget, config) if not key.startswith("HNSW")]
    if config.key and not keys:
        raise ValueError(f"{config.key} cannot be filled in parts\nhint: a larger --part-memory builds it in one "
                         f"worker")
    sizes = {key: estimated_bytes(key, count, dim) for key in keys}
    for key, size in sizes.items():
        if size <= budget:
            return key
    raise _no_room(count, dim, budget, min(sizes.values()), config)


def within(index: faiss.Index, size: int, config: IndexConfig) -> None:
    """ValueError if an index of `size` bytes is larger than its budget."""
    if size > (budget := budget_of(index.ntotal, config)):
        raise _no_room(index.ntotal, index.d, budget, size, config)


def _no_room(count: int, dim: int, budget: int, smallest: int, config: IndexConfig) -> ValueError:
    flag = (f"--bytes-per-vector {-(-max(1, smallest - _ALLOWANCE) // count)}" if budget < memory(config.max_memory)
            else f"--max-memory {-(-smallest // 1024)}K")
    return ValueError(f"no index of {count} vectors of {dim} fits {budget} bytes\n"
                      f"hint: the smallest possible has about {smallest} bytes: {flag}")


def measured(index: faiss.Index, key: str, queries: list[Queries], config: IndexConfig, size: int = 0
             ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Tune a filled index; autofaiss's index_infos, facts, and seconds.

    The search effort is set to the least that reaches the target recall@10 of pictures, or of captions where these are
    all the queries; or to that from which on more effort finds no more.
    """
    count, dim = index.ntotal, index.d
    size = size or len(faiss.serialize_index(index))
    asked = [one for one in queries if len(one.vectors) and (one.ids[:, 9] >= 0).all()]
    curve, setting, milliseconds = [], "", {}
    for setting in _efforts(index) if asked else [""]:
        if setting:
            faiss.ParameterSpace().set_index_parameters(index, setting)
        curve.append({"parameter": setting, **{one.kind: one.recall(index) for one in asked}})
        milliseconds[setting or "all"] = _latency(index, asked[0].vectors if asked else queries[0].vectors)
        found = [one[asked[0].kind]["10"] for one in curve] if asked else []
        if found and found[-1] >= config.target_recall:
            break
        # Where codes are what loses the neighbours, no effort finds them.
        if len(found) > 2 and found[-1] - found[-3] < _FLAT and found[-1] > 0.5 * config.target_recall:
            setting = curve[-3]["parameter"]
            break
    if setting:
        faiss.ParameterSpace().set_index_parameters(index, setting)
    reached = next(one for one in curve if one["parameter"] == setting)
    recall = {one.kind: reached[one.kind] for one in asked}
    infos = {"index_key": key, "index_param": setting, "index_path": "knn.index", "size in bytes": size,
             "nb vectors": count, "vectors dimension": dim,
             "compression ratio": round(4.0 * count * dim / size, 4)}
    info = {"key": key, "parameter": setting, "bytes": size, "budget": budget_of(count, config),
            "bytes_per_vector": round(size / count, 2), "recall_at_10": recall.get("image", {}).get("10"),
            "recall": recall, "recall_queries": len(queries[0].vectors), "recall_rows": count,
            "curve": curve}
    logging.getLogger(__name__).info("index %s: %d bytes, recall@10 %s", key, size, info["recall_at_10"])
    # Times differ from run to run and would make equal indices look different.
    return infos, info, {"milliseconds a query": milliseconds}


def budget_of(count: int, config: IndexConfig) -> int:
    """Bytes that an index of `count` vectors may have."""
    each = config.bytes_per_vector * count + _ALLOWANCE if config.bytes_per_vector else 1 << 62
    return min(memory(config.max_memory), each)


@contextlib.contextmanager
def _hint_if_missing() -> Iterator[None]:
    """Around an import of autofaiss, which `pip install .` does not install: ValueError with the command that does."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("autofaiss", "embedding_reader"):
            raise
        raise _no_autofaiss(str(error)) from error


def _no_autofaiss(reason: str) -> ValueError:
    return ValueError(f"autofaiss, which chooses the kind of index, cannot be imported: {reason}\n"
                      f"hint: pip install --no-deps autofaiss==2.18.0 embedding-reader==1.8.1")


def check_autofaiss() -> None:
    """ValueError with the command that installs autofaiss, if it is missing. Loads nothing."""
    for name in ("autofaiss", "embedding_reader"):
        if importlib.util.find_spec(name) is None:
            raise _no_autofaiss(f"No module named '{name}'")


def _keys(count: int, dim: int, budget: int, config: IndexConfig) -> list[str]:
    """Factory strings from the best to the smallest: autofaiss's choice, then ever shorter codes."""
    if config.key:
        return [config.key]
    with _hint_if_missing():
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
    with _hint_if_missing():
        from autofaiss.external.metadata import IndexMetadata
    return int(IndexMetadata(key, count, dim).estimated_index_size_in_bytes())


def training_rows(key: str, config: IndexConfig) -> int:
    """How many rows an index of this kind is trained on, at most."""
    match = re.search(r"IVF(\d+)", key)
    # More rows for each list take longer, and find hardly anything more; codebooks of 8 bits want 256 times as many.
    return min(config.train_points, max(_ROWS_OF_A_LIST * int(match[1]), _ROWS_OF_CODEBOOKS)) if match else \
        config.train_points


def trained(key: str, sample: np.ndarray, dim: int) -> faiss.Index:
    """An empty index of this kind that was trained on `sample` (N, D), float32 or float16; ValueError if it cannot be.

    Each step of the way sees the sample as the steps before leave it, in blocks: it is in memory once, as float32.
    """
    try:
        index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
        inner = _inner(index)
        if hasattr(inner, "do_polysemous_training"):
            # Orders the codes for a search that is not done here, at two seconds for each byte of a code.
            inner.do_polysemous_training = False
        if isinstance(index, faiss.IndexPreTransform):
            for number in range(index.chain.size()):
                transform = faiss.downcast_VectorTransform(index.chain.at(number))
                _train_transform(transform, sample)
                sample = _transformed(transform, sample)
        sample = np.ascontiguousarray(sample, np.float32)
        _train_inner(inner, sample)
        index.is_trained = True
    except RuntimeError as error:
        raise ValueError(f"faiss cannot build {key} from {len(sample)} vectors of {dim}: {str(error).splitlines()[0]}"
                         f"\nhint: another --key, or none") from error
    return index


def _train_transform(transform: faiss.VectorTransform, sample: np.ndarray) -> None:
    if isinstance(transform, faiss.OPQMatrix):
        rows = np.asarray(sample[::max(1, len(sample) // _ROWS_OF_A_ROTATION)], np.float32)
        faiss.copy_array_to_vector(rotation(rows, transform.d_out, transform.M).reshape(-1), transform.A)
        transform.is_trained = transform.is_orthonormal = True
    elif not transform.is_trained:
        with one_thread():
            transform.train(np.ascontiguousarray(sample, np.float32))


def rotation(rows: np.ndarray, width: int, parts: int) -> np.ndarray:
    """The rotation (width, D) float32 after which codes of so many parts lose least of rows (N, D) float32: OPQ.

    As faiss.OPQMatrix, but each turn goes on from the codebooks of the last one. That learns them anew in every turn,
    which takes longer and leaves a larger error.
    """
    rows = np.ascontiguousarray(rows - rows.mean(0))
    upright = np.ascontiguousarray(rows.T)
    start = faiss.RandomRotationMatrix(rows.shape[1], width)
    with one_thread():
        start.init(17)
    matrix = np.ascontiguousarray(faiss.vector_to_array(start.A).reshape(width, -1).T)
    codebooks, nearest = None, np.empty((parts, len(rows)), np.int64)
    for turn in range(_TURNS):
        turned = _product(rows, matrix)
        how = faiss.ClusteringParameters()
        how.niter, how.max_points_per_centroid = 1 if turn else 10, 1 << 30
        codebooks = _codebooks(turned, parts, 256, how, codebooks, nearest)
        wanted = _product(upright, np.hstack([codebooks[part][nearest[part]] for part in range(parts)]))
        # Directions that the rows do not have stay as they are.
        matrix = _orthonormal(wanted / max(_length(wanted), 1e-20) + _STEADY * matrix)
    return np.ascontiguousarray(matrix.T)


def _codebooks(rows: np.ndarray, parts: int, size: int, how: faiss.ClusteringParameters,
               start: np.ndarray | None = None, nearest: np.ndarray | None = None) -> np.ndarray:
    """`size` centroids of each part of `rows` (N, D), (parts, size, D / parts), refined from those at the `start`.

    `nearest` (parts, N) takes which centroid is nearest to each row. The result is that of faiss.ProductQuantizer, but
    each part has one thread. Threads that share a part wait for each other at every step, which takes many times as
    long when other programs use the same cores.
    """
    width = rows.shape[1] // parts
    found = np.empty((parts, size, width), np.float32)

    def cluster(block: slice) -> None:
        for part in range(parts)[block]:
            some = np.ascontiguousarray(rows[:, part * width:(part + 1) * width])
            clustering, index = faiss.Clustering(width, size, how), faiss.IndexFlatL2(width)
            if start is not None:
                faiss.copy_array_to_vector(start[part].reshape(-1), clustering.centroids)
            clustering.train(some, index)
            found[part] = faiss.vector_to_array(clustering.centroids).reshape(size, width)
            if nearest is not None:
                nearest[part] = index.search(some, 1)[1][:, 0]

    with blocked_scans():
        map_blocks(cluster, parts, 1)
    return found


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal rows or columns, whichever are fewer, by Newton and Schulz.

    numpy's singular values come out otherwise in the last bits with another number of threads, faiss's products do not.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    matrix = np.ascontiguousarray(matrix / max(1.0, _length(matrix)), np.float32)
    for _ in range(_STEPS):
        matrix = 1.5 * matrix - 0.5 * _product(_product(matrix, np.ascontiguousarray(matrix.T)), matrix)
    return np.ascontiguousarray(matrix if wide else matrix.T)


def _length(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.square(matrix).sum()))  # numpy.linalg.norm depends on the number of threads too


def _product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, K) by (K, M) float32, the same bits with any number of threads."""
    transform = faiss.LinearTransform(*other.shape, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(other.T).reshape(-1), transform.A)
    transform.is_trained = True
    return _transformed(transform, one)


def _transformed(transform: faiss.VectorTransform, sample: np.ndarray) -> np.ndarray:
    out = np.empty((len(sample), transform.d_out), np.float32)

    def apply(block: slice) -> None:
        out[block] = transform.apply(np.ascontiguousarray(sample[block], np.float32))

    map_blocks(apply, len(sample), _ROWS_OF_A_THREAD)
    return out


def _before_lists(index: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """Vectors as the part of `index` behind its transforms takes them, contiguous float32."""
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            vectors = _transformed(faiss.downcast_VectorTransform(index.chain.at(number)), vectors)
    return np.ascontiguousarray(vectors, np.float32)


def _search(search: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], queries: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids (Q, k) of queries (Q, D), the same with any number of threads."""
    queries = np.ascontiguousarray(queries, np.float32)
    # faiss would take a block of so few queries one by one, though all of them together are many.
    with blocked_scans() if len(queries) > _QUERIES_OF_A_THREAD else contextlib.nullcontext():
        found = map_blocks(lambda block: search(queries[block]), len(queries), _QUERIES_OF_A_THREAD)
    if not found:
        return search(queries)
    scores, ids = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(ids)


@contextlib.contextmanager
def _safe_threads(inner: faiss.Index) -> Iterator[None]:
    """Let an index make codes with all threads if these do not depend on the number of threads, else with one."""
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        safe = inner.pq.dsub < _PRODUCTS_FROM
    else:
        safe = isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexIVFFlat |
                          faiss.IndexIVFScalarQuantizer | faiss.IndexIVFRaBitQ)
    with contextlib.nullcontext() if safe else one_thread():
        yield


def _train_inner(inner: faiss.Index, sample: np.ndarray) -> None:
    """Train an index without transforms on `sample` (N, D) float32: its lists, then its codes."""
    if not isinstance(inner, faiss.IndexIVF):
        _train_codes(inner, sample, lambda: inner.train(sample))
        return
    with one_thread():
        _train_lists(inner, sample)
    limit = inner.train_encoder_num_vectors()
    rows = sample if limit <= 0 else np.ascontiguousarray(sample[::max(1, -(-len(sample) // limit))])
    lists = None
    if inner.by_residual:
        lists = _nearest_lists(inner.quantizer, rows)
        rows = rows - inner.quantizer.reconstruct_n(0, inner.nlist)[lists]
    _train_codes(inner, rows, lambda: inner.train_encoder(len(rows), faiss.swig_ptr(rows),
                                                          None if lists is None else faiss.swig_ptr(lists)))
    inner.is_trained = True


def _train_codes(inner: faiss.Index, rows: np.ndarray, otherwise: Callable[[], None]) -> None:
    """Train the codes of an index on `rows` (N, D) float32: its codebooks here, anything else by `otherwise`."""
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        quantizer = inner.pq
        found = _codebooks(rows, quantizer.M, quantizer.ksub, quantizer.cp)
        faiss.copy_array_to_vector(found.reshape(-1), quantizer.centroids)
        inner.is_trained = True
        return
    with _safe_threads(inner):
        otherwise()


def _train_lists(inner: faiss.IndexIVF, sample: np.ndarray) -> None:
    """Find the centres of the lists: on a GPU where there is one; where they stand in a graph, fill it with one thread.

    faiss does the rest of them itself, with the same clustering.
    """
    quantizer = faiss.downcast_index(inner.quantizer)
    if not isinstance(quantizer, faiss.IndexHNSW) and not gpus():
        inner.train_q1(len(sample), faiss.swig_ptr(sample), False, inner.metric_type)
        return
    clustering = faiss.Clustering(inner.d, inner.nlist, inner.cp)
    assigner = faiss.IndexFlatL2(inner.d)
    clustering.train(sample, faiss.index_cpu_to_all_gpus(assigner) if gpus() else assigner)
    fill(quantizer, faiss.vector_to_array(clustering.centroids).reshape(inner.nlist, inner.d))


def _nearest_lists(quantizer: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """The nearest list of each of (N, D) float32 vectors, (N,) int64."""
    lists = map_blocks(lambda block: quantizer.search(vectors[block], 1)[1][:, 0], len(vectors), _ROWS_OF_A_THREAD)
    return np.concatenate([np.empty(0, np.int64), *lists])


@cache
def _gpu_resources() -> Any:
    """Memory on the GPU for intermediate results, which faiss takes at once and keeps."""
    return faiss.StandardGpuResources()


def gpus() -> int:
    """How many GPUs faiss uses in this process. Raises DeviceUnavailable if one was reserved and faiss sees none."""
    if not gpus_possible() or devices.reserved() == "cpu":
        return 0
    count = faiss.get_num_gpus()
    if not count and devices.reserved() == "cuda":
        raise devices.DeviceUnavailable("a GPU was reserved and faiss sees none\nhint: nvidia-smi and "
                                        "CUDA_VISIBLE_DEVICES on this node; --gpus 0 computes on the CPU")
    return count


def gpus_possible() -> bool:
    """Whether the installed faiss is the one for GPUs."""
    return hasattr(faiss, "StandardGpuResources")


def fill(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add vectors in order; to a graph with one thread, for with more it differs from run to run."""
    inner = _inner(index)
    if isinstance(inner, faiss.IndexIVF) and not isinstance(inner, faiss.IndexIVFFastScan):
        fill_by_lists(index, vectors, _on_gpus if gpus() else None)
        return
    vectors = _before_lists(index, vectors)
    with _safe_threads(inner):
        inner.add(vectors)
    index.ntotal = inner.ntotal


def _on_gpus(centres: faiss.Index) -> faiss.Index:
    return faiss.index_cpu_to_all_gpus(centres)


def fill_by_lists(index: faiss.Index, vectors: np.ndarray, place: Callable[[faiss.Index], faiss.Index] | None = None
                  ) -> None:
    """Add vectors whose lists are found where `place` puts the centres; the codes, of all kinds, are made here."""
    inner, vectors = _inner(index), _before_lists(index, vectors)
    if place:
        centres = faiss.IndexFlat(inner.d, inner.quantizer.metric_type)
        centres.add(inner.quantizer.reconstruct_n(0, inner.nlist))
        lists = np.ascontiguousarray(place(centres).search(vectors, 1)[1][:, 0])
    else:
        lists = _nearest_lists(inner.quantizer, vectors)
    with _safe_threads(inner):
        inner.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
    index.ntotal = inner.ntotal


def merge(index: faiss.Index, part: faiss.Index) -> None:
    """Move the rows of `part` behind those of `index`, which was trained together with it."""
    inner, other = _inner(index), _inner(part)
    inner.merge_from(other, inner.ntotal) if isinstance(inner, faiss.IndexIVF) else inner.merge_from(other)
    index.ntotal = inner.ntotal


def lists_bytes(index: faiss.Index, count: int) -> int:
    """Bytes of the inverted lists of `count` rows; 0 for an index without lists."""
    inner = _inner(index)
    return count * (inner.code_size + 8) if isinstance(inner, faiss.IndexIVF) else 0


def merge_on_disk(index: faiss.Index, parts: list[faiss.Index], path: Path, *, shift: bool = True) -> None:
    """Merge the lists of `parts` (opened by `mapped`) into the file `path`, as those of `index`, which is empty.

    The rows of each part come behind those of the part before, or with `shift` off have their numbers already.
    """
    inner = _inner(index)
    pointers = faiss.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(_inner(part).invlists)
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(path))
    with _said_on_stderr():
        # Its own shifting takes the size of each part for that of all before it.
        index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    starts = np.cumsum([0, *(part.ntotal for part in parts)])[:-1]
    for number in range(inner.nlist if shift else 0):
        sizes = [_inner(part).invlists.list_size(number) for part in parts]
        if sum(sizes):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), sum(sizes))  # the file itself, mapped
            ids += np.repeat(starts, sizes)
    # Written without a folder: equal indices are equal bytes, and whoever reads it tells where the file is.
    lists.filename = path.name
    _give_lists(inner, lists)


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """faiss tells on stdout, below Python, of each change of a file's size; stdout is for data."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def mapped(path: Path) -> faiss.Index:
    """An index whose lists are read from its file as they are looked at; what has no lists is in memory."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def emptied(index: faiss.Index) -> faiss.Index:
    """`index`, trained as it was and without rows."""
    inner = _inner(index)
    if isinstance(inner, faiss.IndexIVF):
        _give_lists(inner, faiss.ArrayInvertedLists(inner.nlist, inner.code_size))
        index.ntotal = inner.ntotal = 0
    else:
        index.reset()
    return index


def _give_lists(inner: faiss.IndexIVF, lists: faiss.InvertedLists) -> None:
    inner.replace_invlists(lists, True)
    lists.this.disown()


def grows_only(index: faiss.Index) -> bool:
    """Whether rows can be put behind those of an index, and neither leave it nor change their numbers."""
    inner = _inner(index)
    return not isinstance(inner, faiss.IndexIVF | faiss.IndexFlatCodes) or isinstance(inner, faiss.IndexIVFFastScan)


def renumber(index: faiss.Index, sources: list[tuple[faiss.Index, np.ndarray]], loose: Path | None = None) -> None:
    """Fill `index`, which is empty, with the codes of others that were trained together with it.

    A source is an index and the row here of each of its rows, (N,) int64, -1 for what is left out. Rows come in
    ascending order, as if they had been added so. With `loose` the lists are in a file of that name.
    """
    inner = _inner(index)
    total = sum(int((rows >= 0).sum()) for _, rows in sources)
    if isinstance(inner, faiss.IndexIVF):
        lists = (faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(loose)) if loose
                 else faiss.ArrayInvertedLists(inner.nlist, inner.code_size))
        with _said_on_stderr():
            for number in range(inner.nlist):
                found = [_of_a_list(_inner(source), rows, number) for source, rows in sources]
                ids = np.concatenate([one for one, _ in found])
                order = np.argsort(ids)
                ids, codes = ids[order], np.concatenate([one for _, one in found])[order]
                if len(ids):
                    lists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        _give_lists(inner, lists)
    else:
        codes = np.empty((total, inner.code_size), np.uint8)
        for source, rows in sources:
            codes[rows[rows >= 0]] = faiss.vector_to_array(_inner(source).codes).reshape(
                -1, inner.code_size)[rows >= 0]
        faiss.copy_array_to_vector(codes.reshape(-1), inner.codes)
    index.ntotal = inner.ntotal = total


def _of_a_list(inner: faiss.IndexIVF, rows: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The new rows in a list and their codes, those that stay."""
    lists, size = inner.invlists, inner.invlists.list_size(number)
    if not size:
        return np.empty(0, np.int64), np.empty((0, inner.code_size), np.uint8)
    ids = rows[faiss.rev_swig_ptr(lists.get_ids(number), size)]
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * inner.code_size).reshape(size, inner.code_size)
    return ids[ids >= 0], codes[ids >= 0]


def written(index: faiss.Index, folder: Path) -> dict[str, Path]:
    """Write an index into `folder`; its files by name. Lists that are on disk are in that folder, as LISTS."""
    faiss.write_index(index, str(folder / "knn.index"))
    return {name: folder / name for name in ("knn.index", LISTS) if (folder / name).exists()}


class UnreadableIndex(StageFailed):
    """An index file that the installed faiss cannot read."""


def opened(path: Path, lists: Path | None = None, flags: int = 0) -> faiss.Index:
    """The index in the file `path`, whose lists may be in another file, wherever that is by now.

    RuntimeError or MemoryError if the installed faiss cannot read it.
    """
    if lists is None:
        return faiss.read_index(str(path), flags)
    # faiss can look beside the index too, but then says so on stdout; and in a cache the file has another name.
    data, told, now = path.read_bytes(), *(struct.pack("<Q", len(name)) + name for name in (
        LISTS.encode(), str(lists.absolute()).encode()))
    start = data.rfind(told)
    if start < 0:
        raise RuntimeError(f"it does not name {LISTS}")
    return faiss.deserialize_index(np.frombuffer(data[:start] + now + data[start + len(told):], np.uint8),
                                   faiss.IO_FLAG_READ_ONLY)


def open_of(dataset: Dataset, flags: int = 0) -> faiss.Index:
    """The sealed index of a dataset; UnreadableIndex if it is damaged, or of a kind that this faiss does not know."""
    found = {entry["name"]: entry for record in dataset.manifest("index")["items"] for entry in record["files"]}
    lists = dataset.fetch("index", found[LISTS]) if LISTS in found else None
    path = dataset.fetch("index", found["knn.index"])
    try:
        return opened(path, lists, flags)
    except (RuntimeError, MemoryError) as error:
        sealed = storage.sha256_file(path) == found["knn.index"]["sha256"]
        cause = "the file is as it was sealed: another version of faiss wrote it" if sealed else \
            "the file is not as it was sealed: it is damaged"
        raise UnreadableIndex(
            f"the index of {dataset.label} cannot be read: {cause}; expected an index that faiss {faiss.__version__} "
            f"knows, got {str(error).rsplit(': ', 1)[-1]} ({path})\n"
            f"hint: {dataset.command('index')} --rebuild") from error


def error_of(index: faiss.Index, vectors: np.ndarray) -> float:
    """Mean squared distance of unit vectors to what the index makes of them; 0 where it keeps them.

    Of lists with whole vectors it is the distance to the centre of the list.
    """
    some = np.ascontiguousarray(vectors[:10_000], np.float32)
    if not len(some):
        return 0.0
    try:
        with one_thread():
            decoded = index.sa_decode(index.sa_encode(some))
    except RuntimeError:  # a kind that has no codes
        return 0.0
    if isinstance(index, faiss.IndexIVFFlat):
        decoded = index.quantizer.reconstruct_batch(_nearest_lists(index.quantizer, some))
    return round(float(((decoded - some) ** 2).sum(1).mean()), 6)


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


def _latency(index: faiss.Index, queries: np.ndarray) -> dict[str, float]:
    """Milliseconds of a single query by one thread, median and 99th percentile."""
    seconds = []
    with one_thread():
        for query in queries[:200]:
            started = time.perf_counter()
            index.search(query[None], 10)
            seconds.append(time.perf_counter() - started)
    if not seconds:
        return {}
    return {name: round(float(np.percentile(seconds, part)) * 1e3, 4) for name, part in (("p50", 50), ("p99", 99))}


class Searcher:
    """A database opened for search: the index finds candidates, exact vectors rank them."""

    def __init__(self, dataset: Dataset, without: np.ndarray | None = None) -> None:
        """`without` are rows that no search shall find, beside those that have a tombstone."""
        self.dataset = dataset
        self.manifest = dataset.manifest("index")
        self.index = open_of(dataset)
        self.embeddings = Embeddings(dataset)
        if self.index.ntotal != len(self.embeddings):
            raise ValueError(f"the index of {dataset.label} has {self.index.ntotal} rows, its embeddings "
                             f"{len(self.embeddings)}\nhint: {dataset.command('index')} --rebuild")
        self.gone = hidden_rows.rows(dataset)
        if without is not None:
            self.gone = np.union1d(self.gone, without)
        self._parameters = _without(self.index, self.gone) if len(self.gone) else None

    def __len__(self) -> int:
        return len(self.embeddings)

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Ids of about the `count` nearest rows of each query (B, D), (B, count) int64, -1 for none."""
        count = min(count, len(self))
        if self._parameters or not len(self.gone):
            return _search(lambda block: self.index.search(block, count, params=self._parameters), queries)[1]
        # A kind that cannot be told what to leave out: so many more, and what is left of them.
        more = min(count + len(self.gone), len(self))
        found = _search(lambda block: self.index.search(block, more), queries)[1]
        found[np.isin(found, self.gone)] = -1
        return np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), 1)[:, :count]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows: ids (B, k) int64 and inner products (B, k) float32, -1 and -inf for none."""
        return ranked(self.embeddings, queries, self.candidates(queries, 4 * k + 20), k)


class Lists:
    """The inverted lists of a database's index: what is in each, and which are nearest to a query."""

    def __init__(self, dataset: Dataset) -> None:
        """ValueError if the index has no lists."""
        # Mapped: of the codes nothing is read here.
        self._index = open_of(dataset, faiss.IO_FLAG_MMAP)
        self._inner = _inner(self._index)
        if not isinstance(self._inner, faiss.IndexIVF):
            raise ValueError(f"the index of {dataset.label} has no inverted lists")
        self.count, self.probes = int(self._inner.nlist), int(self._inner.nprobe)

    def ids(self, number: int) -> np.ndarray:
        """The global rows in a list, (n,) int64."""
        lists = self._inner.invlists
        size = lists.list_size(number)
        if not size:
            return np.empty(0, np.int64)
        pointer = lists.get_ids(number)
        found = faiss.rev_swig_ptr(pointer, size).copy()
        lists.release_ids(number, pointer)
        return found

    def nearest(self, queries: np.ndarray, probes: int) -> np.ndarray:
        """The lists nearest to queries (Q, D) float32, (Q, probes) int64, nearest first; -1 for none."""
        queries = _before_lists(self._index, queries)
        return _search(lambda block: self._inner.quantizer.search(block, min(probes, self.count)), queries)[1]


def kind(dataset: Dataset) -> Literal["lists", "graph", "scan"]:
    """How the index of a database finds rows: in lists, along a graph, or by looking at all of them."""
    key = dataset.manifest("index")["info"]["key"]
    return "lists" if "IVF" in key else "graph" if "HNSW" in key else "scan"


def _without(index: faiss.Index, gone: np.ndarray) -> faiss.SearchParameters | None:
    """What tells a search to leave rows out; None for a kind that takes no such thing."""
    inner, selector = _inner(index), faiss.IDSelectorNot(faiss.IDSelectorBatch(gone))
    if isinstance(inner, faiss.IndexIVF):
        told = faiss.SearchParametersIVF(sel=selector, nprobe=inner.nprobe)
    elif isinstance(inner, faiss.IndexHNSW):
        told = faiss.SearchParametersHNSW(sel=selector, efSearch=inner.hnsw.efSearch)
    elif isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        told = faiss.SearchParameters(sel=selector)
    else:
        return None
    return faiss.SearchParametersPreTransform(index_params=told) if inner is not index else told


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
