"""The stage `index` with one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.choose import budget_bytes, check_possible, estimated_bytes, factory_keys, no_room_error
from pipeline.indices.config import IndexConfig
from pipeline.indices.faiss_door import faiss, write_index
from pipeline.indices.fill import fill
from pipeline.indices.parallel import IndexingStage, IndexParts, IndexTraining, embedding_inputs, merge_parts
from pipeline.indices.searcher import count_misnumbered_rows
from pipeline.indices.train import train_index, training_rows
from pipeline.indices.tune import RecallQueries, held_out_rows, measure_recall, recall_error
from pipeline.stages.plan import clear_finished, clear_folder
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed


class Index(IndexingStage):
    """The stage from the embeddings of a dataset to index/knn.index and index/index_infos.json."""

    name = "index"
    record_info: ClassVar[dict[str, Any]] = {"key": str, "recall_at_10": (int, float, type(None))}

    def __init__(self, dataset: Dataset, config: IndexConfig) -> None:
        super().__init__(dataset.root, dataset.path("index"), config)
        self.dataset = dataset

    def section(self) -> dict[str, Any]:
        section = super().section()
        if self.config.merge_memory == IndexConfig.merge_memory:
            del section["merge_memory"]  # indices from before there was a choice have the same files
        limits = {"min_recall", "max_drift", "min_self_hit"}
        return {name: value for name, value in section.items() if name not in limits}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return embedding_inputs(self.dataset)

    def before(self) -> list[Stage]:
        """The stages that go before, where the vectors are too many for one worker; they are emptied afterwards."""
        manifest = self.dataset.manifest("embeddings")
        if manifest["totals"]["samples"] <= self.config.rows_of_a_part(manifest["info"]["encoder"]["dim"]):
            return []
        training = IndexTraining(self.dataset, self.config)
        return [training, IndexParts(training, self.config)]

    def plan(self) -> list[Item]:
        manifest = self.dataset.manifest("embeddings")
        check_possible(manifest["totals"]["samples"], manifest["info"]["encoder"]["dim"], self.config)
        return [Item("index")]

    def process(self, item: Item, scratch: Path) -> Output:
        if before := self.before():
            training, parts = before
            assert isinstance(training, IndexTraining) and isinstance(parts, IndexParts)
            index, infos, info, times, held = merge_parts(training, parts, self.config, scratch)
        else:
            vectors = Embeddings(self.dataset).all().astype(np.float32)
            texts = Embeddings(self.dataset, "text_embeddings") if self.uses_captions else None
            index, infos, info, times = build_whole(vectors, self.config, None if texts is None else texts.all())
            held = held_out_rows(len(vectors), self.config)
        return self.output(index, infos, info, times, held, scratch)

    def output(self, index: faiss.Index, infos: dict[str, Any], info: dict[str, Any], times: dict[str, Any],
               held: np.ndarray, scratch: Path) -> Output:
        """The files of an index: the index, index_infos.json of autofaiss, and the rows (Q,) held out of training."""
        if doubled := count_misnumbered_rows(index):
            raise StageFailed(f"index: {doubled} of {index.ntotal} rows are not in it exactly once; nothing is sealed\n"
                              f"hint: build it again with --overwrite; if that fails too, report a bug")
        files = write_index(index, scratch)
        (scratch / "index_infos.json").write_bytes(storage.json_bytes(infos))
        np.save(scratch / "held.npy", held, allow_pickle=False)
        return Output(samples=index.ntotal, info=info, times=times, files=files | {
            name: scratch / name for name in ("index_infos.json", "held.npy")})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        info = records[0]["info"]
        if info["recall_at_10"] is None and self.config.min_recall:
            raise StageFailed(f"index: of {records[0]['samples']} vectors no recall can be measured, --min-recall asks "
                              f"for {self.config.min_recall}\nhint: ten vectors for each query, or do without it")
        if info["recall_at_10"] is not None and info["recall_at_10"] < self.config.min_recall:
            raise StageFailed(f"index: recall@10 is {info['recall_at_10']}, --min-recall asks for "
                              f"{self.config.min_recall}\nhint: more memory, or another --key, and --overwrite; what "
                              f"was built ({info['key']}) is not sealed")
        return Output(info=info)


def build_whole(vectors: np.ndarray, config: IndexConfig, texts: np.ndarray | None = None
          ) -> tuple[faiss.Index, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """An inner-product index over `vectors` (N, D) float32, autofaiss's index_infos, measured facts, and seconds.

    Trained without the rows that serve as queries; `texts` (M, D) are rows of other queries. ValueError if no kind of
    index fits the budget, with the least that would do.
    """
    count, dim = vectors.shape
    if not count:
        raise ValueError("no vectors to index: no image of the dataset could be used")
    budget = budget_bytes(count, config)
    held, rng = held_out_rows(count, config), np.random.default_rng((config.seed, 18))
    kept = np.delete(np.arange(count), held)
    sample = kept if len(kept) <= config.train_points else np.sort(rng.choice(kept, config.train_points, replace=False))
    held = held[vectors[held].any(1)]
    queries = [RecallQueries("image", vectors[held], held)]
    if texts is not None:
        there = np.flatnonzero(texts.any(1))
        chosen = np.sort(rng.choice(there, min(config.queries, len(there)), replace=False))
        queries.append(RecallQueries("text", texts[chosen].astype(np.float32)))
    tried = []
    for key in factory_keys(count, dim, budget, config):
        estimate = estimated_bytes(key, count, dim)
        if not config.key and estimate > budget:
            tried.append(estimate)
            continue
        points = training_rows(key, config)
        seen = vectors[sample if len(sample) <= points else np.sort(rng.choice(sample, points, replace=False))]
        index = train_index(key, seen, dim)
        error = recall_error(index, vectors[held] if len(held) else seen)
        fill(index, vectors)
        size = len(faiss.serialize_index(index)) if count < 5_000_000 else estimate
        if size <= budget:
            break
        tried.append(size)
    else:
        raise no_room_error(count, dim, budget, min(tried), config)
    for query_set in queries:
        query_set.look(vectors, 0)
    infos, info, times = measure_recall(index, key, queries, config, size)
    return index, infos, info | {"error_of_held": error}, times


def build_index(index: Index, seal: Callable[[Stage], dict[str, Any]], *, overwrite: bool = False) -> dict[str, Any]:
    """Build an index, in parts if the vectors are many. `seal` runs a stage until it is sealed.

    It keeps the trained index and removes the parts.
    """
    index.plan()  # refuses impossible settings before training
    before = index.before()
    if overwrite:
        index.inputs()  # refuses bad inputs before anything is removed
        clear_folder(index)
        for stage in reversed(before):
            clear_folder(stage)
    if not storage.exists(storage.join(index.folder, "manifest.json")):
        for stage in before:
            seal(stage)
    manifest = seal(index)
    for stage in before[1:]:
        clear_finished(stage)
    return manifest
