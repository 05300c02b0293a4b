"""An index made from that of another version, without training: rows that stay keep their codes, others are added.

Ids are the global rows of the new version, so what went is not in the new index, and what stayed is renumbered. The
result is the same as if the trained index had been filled with all rows of the new version.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings.embed import check_same_encoder
from pipeline.formats import arrays
from pipeline.formats.sizes import parse_size
from pipeline.indices.choose import check_budget
from pipeline.indices.config import BLOCK, LISTS, TRAINING_SETTINGS, IndexConfig
from pipeline.indices.faiss_door import faiss
from pipeline.indices.fill import can_only_append, fill, lists_bytes, merge_on_disk, remove_rows, renumber
from pipeline.indices.index import Index
from pipeline.indices.searcher import open_dataset_index
from pipeline.indices.tune import (
    RecallQueries,
    measure_recall,
    nonzero_rows,
    read_blocks,
    recall_error,
    sample_rows,
    text_queries,
)
from pipeline.stages.documents import NUMBER
from pipeline.stages.types import Item, Output, StageFailed

_SAMPLE = 10_000  # rows whose error is measured
_TINY = 1e-6  # errors are rounded to this


class Drifted(StageFailed):
    """The added vectors are too far from those of the training: it is time to train again."""


class Extension(Index):
    """The stage from the embeddings of a dataset and the index of another version to index/."""

    record_info: ClassVar[dict[str, Any]] = Index.record_info | {"drift": NUMBER}

    def __init__(self, dataset: Dataset, base: Dataset, config: IndexConfig) -> None:
        super().__init__(dataset, config)
        self.base = base
        if base == dataset:
            raise ValueError(f"{dataset.label} cannot be extended by itself\nhint: --extend names the version that is "
                             f"indexed already")

    @property
    def command(self) -> str:
        return f"{self.dataset.command('index')} --extend {self.base.label}"

    def section(self) -> dict[str, Any]:
        return {name: value for name, value in super().section().items() if name not in TRAINING_SETTINGS}

    def inputs(self) -> dict[str, dict[str, Any]]:
        # Without its path: once the codes are taken over, the base may go.
        return super().inputs() | {"base": self.base.identity("index") | {"path": ""}}

    def before(self) -> list[Any]:
        return []

    def plan(self) -> list[Item]:
        check_same_encoder(self.dataset, self.base)
        return [Item("index")]

    def process(self, item: Item, scratch: Path) -> Output:
        manifest = self.base.manifest("index")
        embeddings, config, before = Embeddings(self.dataset), self.config, manifest["info"]
        training = before.get("training_settings") or {name: manifest["section"][name] for name in sorted(
            TRAINING_SETTINGS & manifest["section"].keys())}  # the base may go
        change = compare_rows(self.dataset, self.base)
        index, size = self._filled(embeddings, change, scratch)
        check_budget(index, size, config)
        rng = np.random.default_rng((config.seed, 17))
        drift = self._drift(index, embeddings, change, before, rng)
        held, own = self._held(change, len(embeddings), rng)
        queries = [RecallQueries("image", embeddings.rows(own).astype(np.float32), own)]
        if self.uses_captions:
            queries.append(text_queries(self.dataset, config, rng))
        for query_set in queries:
            for offset, vectors in read_blocks(embeddings):
                query_set.look(vectors, offset)
        infos, info, times = measure_recall(index, before["key"], queries, config, size)
        info |= drift | {"extends": self.base.label, "kept": change.kept, "added": len(change.added),
                         "removed": change.removed, "training_settings": training}
        return self.output(index, infos, info, times, held, scratch)

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        info = records[0]["info"]
        if info["drift"] > self.config.max_drift:
            raise Drifted(f"index: the vectors added to {self.base.label} have {info['drift']} times the quantization "
                          f"error of its training: expected at most {self.config.max_drift} (--max-drift)\n"
                          f"hint: train it again: {self.dataset.command('index')} --overwrite")
        return super().finish(records, scratch)

    def _filled(self, embeddings: Embeddings, change: "RowChanges", scratch: Path) -> tuple[Any, int]:
        """The index with all rows of the new version, and its bytes."""
        source = open_dataset_index(self.base, faiss.IO_FLAG_MMAP)
        index = remove_rows(open_dataset_index(self.base, faiss.IO_FLAG_MMAP))
        if can_only_append(source):
            return self._grown(embeddings, change)
        added = remove_rows(open_dataset_index(self.base, faiss.IO_FLAG_MMAP))
        for rows in np.split(change.fresh, range(BLOCK, len(change.fresh), BLOCK)):
            if len(rows):
                fill(added, embeddings.rows(rows).astype(np.float32))
        on_disk = lists_bytes(index, len(embeddings)) > parse_size(self.config.merge_memory, "index.merge_memory")
        renumber(index, [(source, change.row_of), (added, change.fresh)], scratch / "loose" if on_disk else None)
        if on_disk:
            compact = remove_rows(open_dataset_index(self.base, faiss.IO_FLAG_MMAP))
            merge_on_disk(compact, [index], scratch / LISTS, shift=False)
            (scratch / "loose").unlink()
            return compact, len(faiss.serialize_index(compact)) + (scratch / LISTS).stat().st_size
        return index, len(faiss.serialize_index(index))

    def _grown(self, embeddings: Embeddings, change: "RowChanges") -> tuple[Any, int]:
        """Append rows to a graph. Other changes of a graph are not possible."""
        if not np.array_equal(change.row_of, np.arange(len(change.row_of))):
            raise ValueError(f"the kind of the index of {self.base.label} cannot remove rows or renumber them\n"
                             f"hint: build it again with {self.dataset.command('index')} --overwrite; a kind with "
                             f"inverted lists, like --key IVF256,SQ8, can be extended")
        index = open_dataset_index(self.base)
        fill(index, embeddings.rows(change.fresh).astype(np.float32))
        return index, len(faiss.serialize_index(index))

    def _drift(self, index: Any, embeddings: Embeddings, change: "RowChanges", before: dict[str, Any],
               rng: np.random.Generator) -> dict[str, float]:
        """The error of quantizing the added rows beside that of rows held out of training, 1 where nothing was added.

        Rows that training saw are no measure: few of them are hardly quantized, if they are all there was.
        """
        at_first = before.get("error_of_held")
        if at_first is None:  # an index from before that was written down
            theirs = Embeddings(self.base)
            sample = theirs.rows(sample_rows(np.arange(len(theirs)), _SAMPLE, rng))
            at_first = recall_error(index, nonzero_rows(sample))
        rows = nonzero_rows(embeddings.rows(sample_rows(change.added, _SAMPLE, rng)))
        error = recall_error(index, rows)
        drift = round((error + _TINY) / (at_first + _TINY), 4) if len(rows) else 1.0
        if drift > self.config.max_drift:
            logging.getLogger(__name__).warning("index: drift %s: %s was trained on other vectors than these", drift,
                                                self.base.label)
        # Handed on: an index that is extended again and again is measured by its training all the same.
        return {"drift": drift, "error_of_held": at_first, "error_of_added": error}

    def _held(self, change: "RowChanges", count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows that training did not see: those known, for the next extension, and those that are queries here.

        Added rows have the share of the queries that they have of all rows.
        """
        entry = next((entry for record in self.base.manifest("index")["items"] for entry in record["files"]
                      if entry["name"] == "held.npy"), None)
        old = arrays.load_array(self.base.fetch("index", entry)) if entry else np.empty(0, np.int64)
        old = change.find(old)
        old, new = np.unique(old), sample_rows(change.added, self.config.queries, rng)
        wanted = min(self.config.queries, count // 10)
        share = max(round(wanted * len(change.added) / count), wanted - len(old))
        new = sample_rows(new, share, rng)
        held = np.union1d(old, new)
        if wanted and not len(held):
            logging.getLogger(__name__).info("index: all rows held out of training are gone, so the recall is measured "
                                             "with rows that training may have seen")
            return held, np.unique(rng.integers(0, count, wanted))
        return held, np.union1d(sample_rows(old, wanted - len(new), rng), new)


@dataclass
class RowChanges:
    """The rows of a base version in a new version."""

    row_of: np.ndarray
    """(N,) the new row of each row of the base whose shard is still there, -1 for the others."""
    fresh: np.ndarray
    """The new rows in shards that the base does not have, ascending."""
    added: np.ndarray
    """The rows of `fresh` whose vectors the base does not have."""
    hashes: np.ndarray
    """A number for each vector of `fresh` that only equal vectors share."""
    hashes_before: np.ndarray
    """The same for the vectors of the base whose `row_of` is -1."""

    @property
    def kept(self) -> int:
        """Number of rows in both versions."""
        return int((self.row_of >= 0).sum()) + len(self.fresh) - len(self.added)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The new rows of the vectors of some rows of the base, also where their shard was written again."""
        places = self.row_of[rows]
        lost = rows[places < 0]
        wanted = self.hashes_before[np.searchsorted(np.flatnonzero(self.row_of < 0), lost)]
        order = np.argsort(self.hashes, kind="stable")
        at = np.searchsorted(self.hashes, wanted, sorter=order)
        is_there = at < len(order)
        is_there[is_there] = self.hashes[order[at[is_there]]] == wanted[is_there]
        moved = np.full(len(lost), -1, np.int64)
        moved[is_there] = self.fresh[order[at[is_there]]]
        places[places < 0] = moved
        return places[places >= 0]

    @property
    def removed(self) -> int:
        """Number of rows that only the base has."""
        return len(self.row_of) - self.kept


def compare_rows(dataset: Dataset, base: Dataset) -> RowChanges:
    """Match the rows of `base` with those of `dataset`: whole shards by hash, other rows one by one."""
    embeddings, theirs = Embeddings(dataset), Embeddings(base)
    row_of, fresh = np.full(len(theirs), -1, np.int64), []
    there: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(theirs.manifest["items"]):
        there[file_of(record, ".npy")["sha256"]].append(number)
    for number, record in enumerate(embeddings.manifest["items"]):
        rows = np.arange(embeddings.offsets[number], embeddings.offsets[number + 1])
        if same := there[file_of(record, ".npy")["sha256"]]:
            first = theirs.offsets[same.pop(0)]
            row_of[first:first + len(rows)] = rows
        else:
            fresh.append(rows)
    unmatched, new = np.flatnonzero(row_of < 0), np.concatenate([np.empty(0, np.int64), *fresh])
    hashes, before = _vector_hashes(embeddings, new), _vector_hashes(theirs, unmatched)
    return RowChanges(row_of, new, new[_unmatched(hashes, before)], hashes, before)


def _unmatched(marks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool: the last occurrences of a value in `marks`, beyond the number that `others` has of it."""
    order = np.argsort(marks, kind="stable")
    ordered = marks[order]
    number = np.arange(len(marks)) - np.searchsorted(ordered, ordered)  # how many of the same came before
    others = np.sort(others)
    have = np.searchsorted(others, ordered, side="right") - np.searchsorted(others, ordered)
    out = np.empty(len(marks), bool)
    out[order] = number >= have
    return out


def _vector_hashes(embeddings: Embeddings, rows: np.ndarray) -> np.ndarray:
    """A number for each row that only equal vectors share, (N,) uint64."""
    factors = np.random.default_rng(0).integers(0, 1 << 63, embeddings.dim, np.uint64) * np.uint64(2) + np.uint64(1)
    parts = [embeddings.rows(block).view(np.uint16).astype(np.uint64) @ factors
             for block in np.split(rows, range(BLOCK // 8, len(rows), BLOCK // 8))]
    return np.concatenate(parts)
