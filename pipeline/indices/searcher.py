"""Search an index."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.config import LISTS
from pipeline.indices.faiss_door import (
    UnreadableIndex,
    faiss,
    inner_index,
    inner_ivf,
    inverted_lists,
    open_index,
    search_in_blocks,
    transform_before_lists,
    untyped_faiss,
)
from pipeline.takedowns import hidden_rows


def count_misnumbered_rows(index: faiss.Index) -> int:
    """How many rows are not in the lists of an index exactly once, or have a number that no row has."""
    inner = inner_index(index)
    if not isinstance(inner, faiss.IndexIVF):
        return 0
    times, beyond = np.zeros(index.ntotal, np.uint8), 0
    for number in range(inner.nlist):
        if size := inverted_lists(inner).list_size(number):
            ids = faiss.rev_swig_ptr(inverted_lists(inner).get_ids(number), size)
            good = ids[(ids >= 0) & (ids < len(times))]
            beyond += size - len(good)
            times[good] += 1  # an id that is twice in one list counts once, so another id is missing
    return beyond + int((times != 1).sum())


def open_dataset_index(dataset: Dataset, flags: int = 0) -> faiss.Index:
    """The sealed index of a dataset; UnreadableIndex if it is damaged, or of a kind that this faiss does not know."""
    entries = {entry["name"]: entry for record in dataset.manifest("index")["items"] for entry in record["files"]}
    lists = dataset.fetch("index", entries[LISTS]) if LISTS in entries else None
    path = dataset.fetch("index", entries["knn.index"])
    try:
        return open_index(path, lists, flags)
    except (RuntimeError, MemoryError) as error:
        sealed = storage.sha256_file(path) == entries["knn.index"]["sha256"]
        cause = "the file is as it was sealed: another version of faiss wrote it" if sealed else \
            "the file is not as it was sealed: it is damaged"
        raise UnreadableIndex(
            f"the index of {dataset.label} cannot be read: {cause}; expected an index that faiss {faiss.__version__} "
            f"knows, got {str(error).rsplit(': ', 1)[-1]} ({path})\n"
            f"hint: {dataset.command('index')} --overwrite") from error


class Searcher:
    """A database opened for search: the index finds candidates, exact vectors rank them."""

    def __init__(self, dataset: Dataset, without: np.ndarray | None = None) -> None:
        """`without` are rows that no search shall find, beside those that have a tombstone."""
        self.dataset = dataset
        self.manifest = dataset.manifest("index")
        self.index = open_dataset_index(dataset)
        self.embeddings = Embeddings(dataset)
        if self.index.ntotal != len(self.embeddings):
            raise ValueError(f"the index of {dataset.label} has {self.index.ntotal} rows, its embeddings "
                             f"{len(self.embeddings)}\nhint: {dataset.command('index')} --overwrite")
        self.hidden = hidden_rows.read_hidden_rows(dataset)
        if without is not None:
            self.hidden = np.union1d(self.hidden, without)
        self._parameters = _exclude(self.index, self.hidden) if len(self.hidden) else None

    def __len__(self) -> int:
        return len(self.embeddings)

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Ids of about the `count` nearest rows of each query (B, D), (B, count) int64, -1 for none."""
        count = min(count, len(self))
        if self._parameters or not len(self.hidden):
            return search_in_blocks(lambda block: self.index.search(block, count, params=self._parameters), queries)[1]
        # This kind cannot skip rows, so it returns more rows, and the hidden ones are removed.
        more = min(count + len(self.hidden), len(self))
        ids = search_in_blocks(lambda block: self.index.search(block, more), queries)[1]
        ids[np.isin(ids, self.hidden)] = -1
        return np.take_along_axis(ids, np.argsort(ids < 0, axis=1, kind="stable"), 1)[:, :count]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows: ids (B, k) int64 and inner products (B, k) float32, -1 and -inf for none."""
        return rank_exactly(self.embeddings, queries, self.candidates(queries, 4 * k + 20), k)


class IndexLists:
    """The inverted lists of a database's index: what is in each, and which are nearest to a query."""

    def __init__(self, dataset: Dataset) -> None:
        """ValueError if the index has no lists."""
        # Mapped: of the codes nothing is read here.
        self._index = open_dataset_index(dataset, faiss.IO_FLAG_MMAP)
        if not isinstance(inner_index(self._index), faiss.IndexIVF):
            raise ValueError(f"the index of {dataset.label} has no inverted lists")
        self._inner = inner_ivf(self._index)
        self.count, self.probes = int(self._inner.nlist), int(self._inner.nprobe)

    def ids(self, number: int) -> np.ndarray:
        """The global rows in a list, (n,) int64."""
        lists: Any = inverted_lists(self._inner)
        size = lists.list_size(number)
        if not size:
            return np.empty(0, np.int64)
        pointer = lists.get_ids(number)
        ids = faiss.rev_swig_ptr(pointer, size).copy()
        lists.release_ids(number, pointer)
        return ids

    def nearest(self, queries: np.ndarray, probes: int) -> np.ndarray:
        """The lists nearest to queries (Q, D) float32, (Q, probes) int64, nearest first; -1 for none."""
        queries = transform_before_lists(self._index, queries)
        return search_in_blocks(lambda block: self._inner.quantizer.search(block, min(probes, self.count)), queries)[1]


def search_kind(dataset: Dataset) -> Literal["lists", "graph", "scan"]:
    """How the index of a database finds rows: in lists, along a graph, or by looking at all of them."""
    key = dataset.manifest("index")["info"]["key"]
    return "lists" if "IVF" in key else "graph" if "HNSW" in key else "scan"


def _exclude(index: faiss.Index, hidden: np.ndarray) -> faiss.SearchParameters | None:
    """Search parameters that skip the hidden rows. None if the kind cannot skip rows."""
    inner, selector = inner_index(index), faiss.IDSelectorNot(faiss.IDSelectorBatch(hidden))
    if isinstance(inner, faiss.IndexIVF):
        parameters = untyped_faiss.SearchParametersIVF(sel=selector, nprobe=inner.nprobe)
    elif isinstance(inner, faiss.IndexHNSW):
        parameters = untyped_faiss.SearchParametersHNSW(sel=selector, efSearch=inner.hnsw.efSearch)
    elif isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        parameters = untyped_faiss.SearchParameters(sel=selector)
    else:
        return None
    return untyped_faiss.SearchParametersPreTransform(index_params=parameters) if inner is not index else parameters


def rank_exactly(embeddings: Embeddings, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of candidate `ids` (B, C) by exact inner product: ids (B, k) and scores (B, k)."""
    vectors = embeddings.rows(ids).astype(np.float32)
    scores = np.einsum("bcd,bd->bc", vectors, np.asarray(queries, np.float32), optimize=True)
    scores[(ids < 0) | ~vectors.any(-1)] = -np.inf  # rows of zeros are images that did not decode
    return best_rows(ids, scores, k)


def best_rows(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of (B, C) scores with their ids, nearest first, equal scores by id; padded by -1 and -inf."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    ids = np.where(np.isneginf(scores), -1, ids)
    short = k - ids.shape[1]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
    return ids.astype(np.int64), scores.astype(np.float32)
