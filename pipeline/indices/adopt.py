"""An index that faiss or autofaiss made elsewhere as the index of a dataset, after a search for its own rows."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.formats.sizes import parse_size
from pipeline.indices.choose import check_budget
from pipeline.indices.config import LISTS, TRAINING_SETTINGS, IndexConfig
from pipeline.indices.faiss_door import (
    factory_key,
    faiss,
    inner_index,
    lists_are_on_disk,
    open_foreign_index,
    search_in_blocks,
    without_identity_map,
)
from pipeline.indices.fill import lists_bytes, merge_on_disk, remove_rows
from pipeline.indices.index import Index
from pipeline.indices.searcher import count_misnumbered_rows
from pipeline.indices.tune import (
    RecallQueries,
    held_out_rows,
    measure_recall,
    read_blocks,
    recall_error,
    text_queries,
)
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

_log = logging.getLogger(__name__)
DEPTH = 10
"""A sampled row must be among so many results of a search for its own vector."""
_ROWS_OF_A_SHARD, _MOST_ROWS = 16, 1 << 16
_FEWEST_TO_JUDGE = 8  # sampled rows of a shard that say something about it alone
_COPY = 0.9995  # rows at least so similar are as good an answer as the row itself
_LONGER = 0.01  # share by which whole vectors may be longer or shorter, and so their scores
_LONGER_CODES = 0.2  # the same for the median of codes


class AdoptIndex(Index):
    """The stage from the embeddings of a dataset and another program's index file to index/.

    ValueError if dimension, number of rows or metric differ from those of the embeddings, if the ids are not global
    rows, or if a search for sampled rows does not find them.
    """

    def __init__(self, dataset: Dataset, config: IndexConfig, file: str) -> None:
        super().__init__(dataset, config)
        self.file = storage.normalize(file)
        if config.key:
            raise ValueError(f"--adopt {file} takes an index of the kind that it is: expected no --key, got "
                             f"{config.key}\nhint: index without --adopt builds one of that kind")

    @property
    def command(self) -> str:
        return f"{self.dataset.command('index')} --adopt {self.file}"

    def section(self) -> dict[str, Any]:
        return {"adopted": True} | {name: value for name, value in super().section().items()
                                    if name not in TRAINING_SETTINGS}

    def inputs(self) -> dict[str, dict[str, Any]]:
        try:
            digest = storage.digest(storage.summarize_file(self.file))
        except FileNotFoundError:
            raise ValueError(f"there is no file {self.file}\nhint: --adopt names a faiss index, like the knn.index of "
                             f"autofaiss") from None
        return super().inputs() | {"file": {"path": "", "digest": digest}}

    def before(self) -> list[Stage]:
        return []

    def plan(self) -> list[Item]:
        return [Item("index")]

    def process(self, item: Item, scratch: Path) -> Output:
        embeddings, config = Embeddings(self.dataset), self.config
        index, size = self._open(embeddings, scratch)
        check_budget(index, size, config)
        self._check_vectors(index, embeddings)
        held = held_out_rows(len(embeddings), config)
        own = held[embeddings.rows(held).any(1)]
        queries = [RecallQueries("image", embeddings.rows(own).astype(np.float32), own)]
        if self.uses_captions:
            queries.append(text_queries(self.dataset, config, np.random.default_rng((config.seed, 18))))
        for query_set in queries:
            for offset, vectors in read_blocks(embeddings):
                query_set.look(vectors, offset)
        infos, info, times = measure_recall(index, factory_key(index), queries, config, size)
        info |= {"adopted": self.file.rpartition("/")[2], "error_of_held": recall_error(index, queries[0].vectors)}
        return self.output(index, infos, info | self._find_rows(index, embeddings), times, held, scratch)

    def _open(self, embeddings: Embeddings, scratch: Path) -> tuple[faiss.Index, int]:
        """The index and its bytes. Lists that memory should not hold are in a file in `scratch` then."""
        local = Path(storage.local_path(self.file)) if storage.is_local(self.file) else \
            storage.download(self.file, scratch / "foreign.index")
        index = without_identity_map(open_foreign_index(local, self.file), self.file)
        self._check_form(index, embeddings)
        size, on_disk = local.stat().st_size, lists_are_on_disk(index)
        if on_disk or lists_bytes(index, index.ntotal) > parse_size(self.config.merge_memory, "index.merge_memory"):
            compact = remove_rows(without_identity_map(open_foreign_index(local, self.file), self.file))
            merge_on_disk(compact, [index], scratch / LISTS, shift=False)
            index, size = compact, len(faiss.serialize_index(compact)) + (scratch / LISTS).stat().st_size
        if local.parent == scratch:
            local.unlink()
        return index, size

    def _check_form(self, index: faiss.Index, embeddings: Embeddings) -> None:
        """ValueError unless the index can be one of these embeddings."""
        if not isinstance(inner_index(index), faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexFlatCodes):
            raise self._refusal("kind", "inverted lists, a graph (HNSW), or codes of all rows",
                                type(inner_index(index)).__name__)
        if index.d != embeddings.dim:
            raise self._refusal("vectors of another length", f"{embeddings.dim} numbers", f"{index.d}")
        if index.ntotal != len(embeddings):
            raise self._refusal("another number of vectors", f"{len(embeddings)}, one for each row", f"{index.ntotal}")
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            metric = "L2" if index.metric_type == faiss.METRIC_L2 else f"number {index.metric_type}"
            raise self._refusal("another metric", "the inner product", metric)
        if wrong := count_misnumbered_rows(index):
            raise self._refusal("other ids", f"each row from 0 to {len(embeddings) - 1} once",
                                f"{wrong} rows that are missing, repeated or beyond")

    def _check_vectors(self, index: faiss.Index, embeddings: Embeddings) -> None:
        """ValueError unless an index with whole vectors has those of the embeddings, row by row."""
        if not isinstance(index, faiss.IndexFlat | faiss.IndexHNSWFlat):
            return
        wrong: list[int] = []
        for offset, vectors in read_blocks(embeddings):
            theirs = index.reconstruct_n(offset, len(vectors))
            # Rows with NaN or infinity are equal to none.
            ours_long, theirs_long = np.linalg.norm(vectors, axis=1), np.linalg.norm(theirs, axis=1)
            equal = (np.einsum("nd,nd->n", vectors, theirs) >= _COPY * ours_long * theirs_long) & (
                abs(ours_long - theirs_long) <= _LONGER * ours_long)
            wrong += (offset + np.flatnonzero(~equal | (vectors.any(1) != theirs.any(1)))).tolist()
        if wrong:
            raise self._refusal("other vectors", "the vector of each row",
                                f"others for {len(wrong)} of {len(embeddings)} rows, the first is row {wrong[0]}")

    def _find_rows(self, index: faiss.Index, embeddings: Embeddings) -> dict[str, Any]:
        """The share of sampled rows that a search for their own vectors finds; ValueError if it is too small."""
        rows, shards = self._sample(embeddings)
        vectors = embeddings.rows(rows).astype(np.float32)
        scores, ids = search_in_blocks(lambda block: index.search(block, DEPTH), vectors)
        cosines = np.einsum("bkd,bd->bk", embeddings.rows(ids).astype(np.float32), vectors)
        hits = (ids == rows[:, None]).any(1) | (cosines.min(1) >= _COPY)
        # Whole vectors lie in the list nearest to them.
        least = 1.0 if isinstance(inner_index(index), faiss.IndexIVFFlat) else self.config.min_self_hit
        for where, here, bound in [("", np.ones(len(rows), bool), least), *(
                (f" of shard {record['id']}", shards == number, least / 2)
                for number, record in enumerate(embeddings.manifest["items"]))]:
            share = float(hits[here].mean()) if here.any() else 1.0
            if share < bound and (not where or here.sum() >= _FEWEST_TO_JUDGE):
                row = int(np.flatnonzero(here & ~hits)[0])
                raise self._refusal(
                    f"other rows: a search for {int(here.sum())} sampled rows{where} must find each among {DEPTH} "
                    f"results", f"a share of at least {bound:g}", f"{share:.3f}; row {rows[row]} gives "
                    f"{', '.join(map(str, ids[row].tolist()))}",
                    f"are its vectors those of {embeddings.folder}, in that order? An index of short codes may pass "
                    f"with --min-self-hit")
        if len(own := scores[ids == rows[:, None]]):
            self._check_scores(index, float(np.median(own)), float((vectors ** 2).sum(1).mean()))
        if not hits.all():
            _log.warning("index: a search for %d of %d sampled rows did not find them, the first is row %d",
                         np.sum(~hits), len(rows), rows[int(np.argmin(hits))])
        return {"self_hit": round(float(hits.mean()), 4) if len(rows) else None, "self_hit_rows": len(rows)}

    def _check_scores(self, index: faiss.Index, score: float, expected: float) -> None:
        """ValueError if rows find themselves with another score than that of vectors of this length."""
        # A projection (PCA) makes vectors shorter.
        shorter = _LONGER if isinstance(index, faiss.IndexIVFFlat) else math.inf
        longer = _LONGER if isinstance(index, faiss.IndexIVFFlat) else _LONGER_CODES
        if not expected * (1 - shorter) <= score <= expected * (1 + longer):
            raise self._refusal("longer or shorter vectors", f"a score of {expected:.3f} where a row finds itself",
                                f"{score:.3f}, the median")

    def _sample(self, embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """Rows of every shard (Q,) int64 that are not zeros, and the number of the shard of each."""
        rng, parts = np.random.default_rng((self.config.seed, 19)), [np.empty(0, np.int64)]
        each = max(1, min(_ROWS_OF_A_SHARD, _MOST_ROWS // max(1, len(embeddings.shards))))
        for offset, shard in zip(embeddings.offsets[:-1], embeddings.shards, strict=True):
            chosen = np.sort(rng.choice(len(shard), min(each, len(shard)), replace=False))
            parts.append(offset + chosen[np.asarray(shard[chosen]).any(1)])
        return np.concatenate(parts), np.repeat(np.arange(len(parts)) - 1, [len(part) for part in parts])

    def _refusal(self, what: str, expected: str, actual: str, hint: str = "") -> ValueError:
        return ValueError(f"{self.file} is no index of {self.dataset.label}: {what}: expected {expected}, got "
                          f"{actual}\nhint: {hint or self.dataset.command('index') + ' builds one'}")
