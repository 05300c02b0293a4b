"""An index for more vectors than one worker can hold: trained on a sample, filled in parts, and merged.

index-training/   trained.index, and the queries that measure the result (rows kept out of the sample)
index-parts/      part.index for a group of shards, and the exact neighbors of the queries among its rows
index/            the parts as one, tuned and measured against the exact neighbors of all parts
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings, check_finite
from pipeline.formats import arrays
from pipeline.formats.sizes import is_decimal, parse_size, stored_size
from pipeline.hardware import devices
from pipeline.indices.choose import choose_key
from pipeline.indices.config import BLOCK, EXACT, LISTS, SIZES, IndexConfig
from pipeline.indices.faiss_door import count_gpus, faiss, is_gpu_build, map_index
from pipeline.indices.fill import fill, lists_bytes, merge, merge_on_disk
from pipeline.indices.searcher import best_rows
from pipeline.indices.train import train_index, training_rows
from pipeline.indices.tune import RecallQueries, measure_recall, nonzero_rows, recall_error
from pipeline.stages.manifest import read_manifest, sealed_input
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output


class IndexingStage(Stage):
    """A stage on the way to an index of `dataset`."""

    dataset: Dataset

    @property
    def command(self) -> str:
        return self.dataset.command("index")

    most_gpus = 1024  # faiss uses all that it sees
    optional_inputs = frozenset({"text_embeddings"})

    @property
    def uses_captions(self) -> bool:
        """Whether the plan of the stage has embeddings of captions. The stage ignores later ones."""
        return "text_embeddings" in (self.claim.inputs if self.claim else self.inputs())

    @property
    def workers_need_gpu(self) -> bool:  # type: ignore[override]
        """Whether this faiss could use one."""
        return is_gpu_build()

    def check_device(self) -> None:
        count_gpus()

    @property
    def alternative(self) -> str:
        decimal = any(is_decimal(getattr(self.config, name), f"index.{name}") for name in SIZES)
        return super().alternative + (", or write a size that is stored as 4G as 4Gi" if decimal else "")

    def section(self) -> dict[str, Any]:
        return {name: stored_size(value, f"index.{name}") if name in SIZES else value
                for name, value in super().section().items()}

    def setup(self) -> None:
        self.precision = "fp32"
        if count_gpus():
            self.device = f"{devices.visible_cards()}, {self.precision}"


def embedding_inputs(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The sealed embeddings that an index of `dataset` is made from: of images, and of captions if there are any."""
    names = ["embeddings", *(["text_embeddings"] if dataset.is_sealed("text_embeddings") else [])]
    return {name: dataset.identity(name) for name in names}


class IndexTraining(IndexingStage):
    """The stage that chooses a kind of index and trains it on a seeded sample of all shards."""

    name = "index_training"

    def __init__(self, dataset: Dataset, config: IndexConfig) -> None:
        super().__init__(dataset.root, dataset.path("index-training"), config)
        self.dataset = dataset

    def section(self) -> dict[str, Any]:
        unused = {"target_recall", "min_recall", "part_memory", "merge_memory", "max_drift", "min_self_hit"}
        return {name: value for name, value in super().section().items() if name not in unused}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return embedding_inputs(self.dataset)

    def plan(self) -> list[Item]:
        return [Item("training")]

    def process(self, item: Item, scratch: Path) -> Output:
        embeddings, config = Embeddings(self.dataset), self.config
        count, rng = len(embeddings), np.random.default_rng((config.seed, 17))
        key = choose_key(count, embeddings.dim, config)
        points, kept = training_rows(key, config), min(config.queries, count // 10)
        permutation = rng.choice(count, min(count, kept + points), replace=False, shuffle=True)
        held, sample = np.sort(permutation[:kept]), np.sort(permutation[kept:])
        own, sample = (rows[embeddings.rows(rows, once=True).any(1)] for rows in (held, sample))
        # No name holds the sample: its memory is freed after the first step of the training.
        index = train_index(key, embeddings.rows(sample, once=True), embeddings.dim)
        seen = embeddings.rows(sample[::max(1, len(sample) // 10_000)], once=True)
        faiss.write_index(index, str(scratch / "trained.index"))
        np.save(scratch / "held.npy", own, allow_pickle=False)
        np.save(scratch / "images.npy", embeddings.rows(own, once=True).astype(np.float32), allow_pickle=False)
        files = ["trained.index", "held.npy", "images.npy"]
        if self.uses_captions:
            texts = Embeddings(self.dataset, "text_embeddings")
            chosen = np.sort(rng.choice(len(texts), min(len(texts), config.queries), replace=False))
            np.save(scratch / "texts.npy", nonzero_rows(texts.rows(chosen)).astype(np.float32), allow_pickle=False)
            files.append("texts.npy")
        return Output(samples=len(sample), files={name: scratch / name for name in files},
                      info={"key": key, "rows": count, "trained_on": len(sample), "error": recall_error(index, seen)})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info=records[0]["info"])


class IndexParts(IndexingStage):
    """The stage that fills copies of the trained index, one for each group of shards."""

    name = "index_parts"

    def __init__(self, training: IndexTraining, config: IndexConfig) -> None:
        super().__init__(training.root, training.dataset.path("index-parts"), config)
        self.dataset, self.training = training.dataset, training

    def section(self) -> dict[str, Any]:
        return {"part_memory": super().section()["part_memory"]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"training": sealed_input(self.root, self.training.path, self.command),
                "embeddings": self.dataset.identity("embeddings")}

    def plan(self) -> Iterator[Item]:
        manifest = self.dataset.manifest("embeddings")
        room = self.config.rows_of_a_part(manifest["info"]["encoder"]["dim"])
        group: list[dict[str, Any]] = []
        offset = first = number = 0
        for record in manifest["items"]:
            if group and offset + record["samples"] - first > room:
                yield self._item(number, first, group)
                number, first, group = number + 1, offset, []
            group.append({"id": record["id"], "samples": record["samples"], "file": file_of(record, ".npy")})
            offset += record["samples"]
        yield self._item(number, first, group)

    def _item(self, number: int, first: int, group: list[dict[str, Any]]) -> Item:
        count = sum(record["samples"] for record in group)
        return Item(f"{number:06d}", {"first": first, "shards": group, "count": count})

    def process(self, item: Item, scratch: Path) -> Output:
        index = faiss.read_index(str(_fetch_training_file(self.training, "trained.index")))
        queries = held_out_queries(self.training)
        first, count, error = item.inputs["first"], 0, []
        for shard in item.inputs["shards"]:
            rows = arrays.map_array(self.dataset.fetch("embeddings", shard["file"], check=True))
            for start in range(0, len(rows), BLOCK):
                vectors = check_finite(np.asarray(rows[start:start + BLOCK], np.float32), f"shard {shard['id']}")
                fill(index, vectors)
                error.append((recall_error(index, vectors[::max(1, len(vectors) // 200)]), len(vectors)))
                for query_set in queries:
                    query_set.look(vectors, first + count)
                count += len(vectors)
        faiss.write_index(index, str(scratch / "part.index"))
        files = {f"{item.id}.index": scratch / "part.index"}
        for query_set in queries:
            for what, values in (("ids", query_set.ids), ("scores", query_set.scores)):
                np.save(path := scratch / f"{query_set.kind}.{what}.npy", values, allow_pickle=False)
                files[f"{item.id}.{query_set.kind}.{what}.npy"] = path
        total = sum(rows for _, rows in error)
        return Output(samples=count, files=files,
                      info={"error": round(sum(value * rows for value, rows in error) / max(1, total), 6)})


def merge_parts(training: IndexTraining, parts: IndexParts, config: IndexConfig, scratch: Path
             ) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """The parts as one index, autofaiss's index_infos, measured facts, seconds, and the rows training did not see.

    Lists that are too large for memory are merged into a file in `scratch`.
    """
    index = faiss.read_index(str(_fetch_training_file(training, "trained.index")))
    queries = held_out_queries(training)
    manifest = read_manifest(parts.folder, parts.command)
    paths = [_fetch_file(parts, record, f"{record['id']}.index") for record in manifest["items"]]
    size = 0
    if lists_bytes(index, manifest["totals"]["samples"]) > parse_size(config.merge_memory, "index.merge_memory"):
        merge_on_disk(index, [map_index(path) for path in paths], scratch / LISTS)
        size = len(faiss.serialize_index(index)) + (scratch / LISTS).stat().st_size
    else:
        for path in paths:
            merge(index, faiss.read_index(str(path)))
    for record in manifest["items"]:
        for query_set in queries:
            ids, scores = (arrays.load_array(_fetch_file(parts, record, f"{record['id']}.{query_set.kind}.{what}.npy"))
                           for what in ("ids", "scores"))
            query_set.ids, query_set.scores = best_rows(np.hstack([query_set.ids, ids]),
                                                   np.hstack([query_set.scores, scores]), EXACT)
    about = read_manifest(training.folder, training.command)["info"]
    infos, info, times = measure_recall(index, about["key"], queries, config, size)
    info |= {"parts": len(manifest["items"]), "trained_on": about["trained_on"], "error_of_training": about["error"],
             "error_of_held": recall_error(index, queries[0].vectors)}
    # The parts are removed, and with them what tells how long they took.
    times["seconds of the parts"] = manifest["run"]["seconds"]
    return index, infos, info, times, arrays.load_array(_fetch_training_file(training, "held.npy"))


def held_out_queries(training: IndexTraining) -> list[RecallQueries]:
    """The queries of a training: images that it did not see, and captions if there are any."""
    query_sets = [RecallQueries("image", arrays.load_array(_fetch_training_file(training, "images.npy")),
                     arrays.load_array(_fetch_training_file(training, "held.npy")))]
    if any(entry["name"] == "texts.npy" for record in read_manifest(training.folder, training.command)["items"]
           for entry in record["files"]):
        texts = arrays.load_array(_fetch_training_file(training, "texts.npy"))
        query_sets.append(RecallQueries("text", texts))
    return query_sets


def _fetch_training_file(training: IndexTraining, name: str) -> Path:
    record = read_manifest(training.folder, training.command)["items"][0]
    return _fetch_file(training, record, name)


def _fetch_file(stage: Stage, record: dict[str, Any], name: str) -> Path:
    entry = next(entry for entry in record["files"] if entry["name"] == name)
    return storage.fetch(storage.join(stage.folder, name), entry)
