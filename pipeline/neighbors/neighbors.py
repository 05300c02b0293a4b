"""The stage `neighbors`."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings, check_finite
from pipeline.datasets.metadata import labels, perceptual_hashes
from pipeline.datasets.row_columns import SCORES, RowSelection
from pipeline.embeddings.embed import check_same_encoder
from pipeline.formats import arrays
from pipeline.hardware import devices, malloc
from pipeline.indices import searcher
from pipeline.indices.searcher import IndexLists, Searcher
from pipeline.neighbors.by_list import bytes_per_query, search_by_list
from pipeline.neighbors.config import ALL_ROWS_FROM_LISTS, SPARE_CANDIDATES, NeighborsConfig
from pipeline.neighbors.exhaustive import halved_batches, search_device, search_exhaustively
from pipeline.neighbors.files import neighbor_files
from pipeline.neighbors.rank import Candidates, Copies, NeighborQueries, rank_candidates, search_all_rows
from pipeline.stages.scratch import shared_scratch
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Item, Output
from pipeline.storage import DamagedFile
from pipeline.takedowns import hidden_rows

_LAID = 64 << 20  # bytes of vectors that are laid out at a time
_WRITTEN = 4096  # rows that are gathered and written at a time
SCORE_BINS = np.linspace(-1, 1, 101)  # bounds of the bins that scores are counted in


class Neighbors(Stage):
    """The stage from a dataset and a database to neighbors/<database>: ids and scores, (N_i, k)."""

    name = "neighbors"
    growing_inputs = frozenset({"forgotten"})  # batches leave out what was forgotten or hidden later
    optional_inputs = frozenset({"tombstones"})
    record_info: ClassVar[dict[str, Any]] = {"scores": [int], "missing": int, "checked?": int, "agreed?": int}

    def __init__(self, dataset: Dataset, database: Dataset, config: NeighborsConfig) -> None:
        super().__init__(dataset.root, dataset.path(f"neighbors/{database.label}"), config)
        self.dataset, self.database = dataset, database
        self.workers_need_gpu = config.method == "exact"  # type: ignore[misc]

    @property
    def command(self) -> str:
        return self.dataset.command(f"neighbors/{self.database.label}")

    def section(self) -> dict[str, Any]:
        unused = {"max_memory", "at_once"} | ({"where"} if not self.config.where else set())
        return {name: value for name, value in super().section().items() if name not in unused}

    def inputs(self) -> dict[str, dict[str, Any]]:
        inputs = {"shards": self.dataset.identity("shards"), "embeddings": self.dataset.identity("embeddings"),
                 "database": self.database.identity("embeddings"), "database_shards": self.database.identity("shards")}
        if self.config.method == "index":
            inputs["index"] = self.database.identity("index")
        inputs |= hidden_rows.hidden_row_inputs(self.database)
        if self.config.where:
            inputs |= {f"database_{name}": identity for name, identity in
                       RowSelection(self.database, self.config.where).inputs().items()}
        return inputs

    def plan(self) -> list[Item]:
        check_same_encoder(self.dataset, self.database)
        inputs = self.inputs()
        made_from = storage.digest([*map(inputs.get, ("database", "database_shards", "index", "tombstones")),
                                  *filter(None, [inputs.get("forgotten")]),
                                  *([self.config.where, *(identity for name, identity in sorted(inputs.items())
                                                          if name.startswith(f"database_{SCORES}/"))]
                                    if self.config.where else [])])
        shards = {record["id"]: record for record in self.dataset.manifest("shards")["items"]}
        if self.config.copy_bits >= 0:
            for dataset in {self.dataset, self.database}:
                perceptual_hashes(dataset, dataset.manifest("shards")["items"][0])
        records = self.dataset.manifest("embeddings")["items"]
        total = max(1, sum(record["samples"] for record in records))
        dim = self.dataset.manifest("embeddings")["info"]["encoder"]["dim"]
        at_once = self.config.shards_at_once(len(records), total, dim, lists=self.config.method == "index"
                                             and searcher.search_kind(self.database) == "lists")
        items, offset = [], 0
        for start in range(0, len(records), at_once):
            group = records[start:start + at_once]
            count = sum(record["samples"] for record in group)
            end = offset + count
            # Only what the item needs: a worker that opened all embeddings would fetch them all.
            ends = np.cumsum([offset, *(record["samples"] for record in group)]).tolist()
            items.append(Item(group[0]["id"] if len(group) == 1 else f"{group[0]['id']}-{group[-1]['id']}", {
                "offset": offset, "count": count, "database": made_from,
                # How many samples of a shard are checked does not depend on which are searched together.
                "shards": [{"shard": shards[record["id"]], "embeddings": record,
                            "checked": self.config.checked * last // total - self.config.checked * first // total}
                           for record, first, last in zip(group, ends, ends[1:], strict=False)]}))
            offset = end
        return items

    def process(self, item: Item, scratch: Path) -> Output:
        self.precision = devices.dtype_name(search_device()[1]) if self.workers_need_gpu else "fp32"
        malloc.release_freed_memory()  # what the last item took, in pieces that do not fit this one
        times = Times()
        hashed = self.config.copy_bits >= 0
        database = _open_database(self.database, self.config.method, hashed, item.inputs["database"], self.config.where)
        if database.seconds:
            times.add("open", database.seconds)
            database.seconds = 0.0
        queries = self._queries(item)
        if queries.vectors.shape[1] != database.embeddings.dim:
            raise DamagedFile(f"shard {item.id} of {self.dataset.label} has vectors of {queries.vectors.shape[1]} "
                              f"numbers, the database {self.database.label} of {database.embeddings.dim}\n"
                              f"hint: python -m jobs verify")
        ids = np.full((len(queries), self.config.k), -1, np.int64)
        scores = np.full(ids.shape, -np.inf, np.float32)
        there = np.flatnonzero(queries.vectors.any(1))  # a row of zeros is equally near to everything
        if len(there):
            ids[there], scores[there] = self._found(database, queries if len(there) == len(queries) else queries[there],
                                                    times)
        malloc.release_freed_memory()
        with times("check"):
            info = _score_facts(ids, scores) | self._quality(database, queries, ids, there, item)
        if self.config.where:
            info["visible"] = int((~database.hidden).sum())
        files, start = {}, 0
        for shard in item.inputs["shards"]:
            part = slice(start, start + shard["embeddings"]["samples"])
            for name, values in (("ids", ids), ("scores", scores)):
                files[f"{shard['shard']['id']}.{name}.npy"] = path = scratch / f"{shard['shard']['id']}.{name}.npy"
                np.save(path, values[part], allow_pickle=False)
            if self.config.vectors:
                files[f"{shard['shard']['id']}.vectors.npy"] = path = scratch / f"{shard['shard']['id']}.vectors.npy"
                _write_vectors(path, database.embeddings, ids[part])
            start = part.stop
        return Output(samples=len(queries), info=info, files=files, times=times.pop_seconds() | halved_batches())

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        usage = self._usage(records)
        np.save(scratch / "usage.npy", usage, allow_pickle=False)
        infos = [record["info"] for record in records]
        counts = sum((np.array(info["scores"]) for info in infos), np.zeros(len(SCORE_BINS) - 1, np.int64))
        checked = sum(info.get("checked", 0) for info in infos)
        recall = sum(info.get("agreed", 0) for info in infos) / checked if checked else None
        visible = {"visible": infos[0]["visible"]} if infos and self.config.where else {}
        if visible:
            self.config.warn_if_few(visible["visible"], self.database.label)
        return Output(files={"usage.npy": scratch / "usage.npy"}, info=visible | {
            "missing": sum(info["missing"] for info in infos), "k": self.config.k, "database": self.database.label,
            "scores": counts.tolist(), "recall": None if recall is None else round(recall, 4),
            "recall_pairs": checked, "exact": self._exact, "rows": len(usage), "never_used": int((usage == 0).sum()),
            "most_used": int(usage.max(initial=0))})

    @property
    def _exact(self) -> bool:
        return self.config.method == "exact" or searcher.search_kind(self.database) == "scan"

    def _queries(self, item: Item) -> NeighborQueries:
        hashed, shards = self.config.copy_bits >= 0, item.inputs["shards"]
        vectors = [self._vectors(shard) for shard in shards]
        rows = item.inputs["offset"] + np.arange(sum(map(len, vectors)))
        own = rows if self.dataset == self.database else np.full(len(rows), -1)
        hashes = None
        if hashed:
            hashes = np.concatenate([perceptual_hashes(self.dataset, shard["shard"]) for shard in shards])
        return NeighborQueries(np.concatenate(vectors, dtype=np.float32), own,
                               np.concatenate([labels(self.dataset, shard["shard"]) for shard in shards]), hashes)

    def _vectors(self, shard: dict[str, Any]) -> np.ndarray:
        """The vectors of a shard, (N_i, D) float16."""
        own = self.dataset.fetch("embeddings", file_of(shard["embeddings"], ".npy"))
        vectors = check_finite(arrays.load_array(own), str(own))
        if len(vectors) != shard["shard"]["samples"]:
            raise DamagedFile(f"{own} has {len(vectors)} rows, its shard {shard['shard']['samples']} samples\n"
                              f"hint: python -m jobs verify")
        return vectors

    def _found(self, database: "OpenDatabase", queries: NeighborQueries, times: Times, *, exactly: bool = False
               ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores (Q, k). Queries with too few candidates that are no copies are compared with all rows."""
        k, config = self.config.k, self.config
        copies = Copies(database.labels, config.copy_similarity, database.hashes, config.copy_bits, database.hidden)
        wanted = min(config.wanted, len(database.embeddings))
        probes = (config.probes or database.lists.probes) if database.lists else 0
        if database.lists and not exactly and ALL_ROWS_FROM_LISTS * probes < database.lists.count:
            # A few more than k are mostly enough, and more candidates take time.
            ids, scores = self._in_lists(database, queries, copies, min(wanted, k + SPARE_CANDIDATES), probes, times)
            short = np.flatnonzero((ids < 0).any(1))
            if len(short) and wanted > k + SPARE_CANDIDATES:
                ids[short], scores[short] = self._in_lists(database, queries[short], copies, wanted, probes, times)
        elif database.graph and not exactly:
            with times("products"):
                ids = database.graph.candidates(queries.vectors, wanted)
            candidates = Candidates(ids, np.where(ids >= 0, 0, -np.inf).astype(np.float32), np.inf)
            with times("settle"):
                ids, scores = rank_candidates(candidates, queries, database.embeddings, copies, k)
        else:
            candidates = search_exhaustively(queries.vectors, database.embeddings, wanted, config.block_bytes, times)
            with times("settle"):
                return self._certain(database, queries, candidates, copies)
        # A search of a few lists may have too few rows, whatever the number of candidates.
        short = np.flatnonzero((ids < 0).any(1))
        if len(short):
            with times("again"):
                ids[short], scores[short] = self._found(database, queries[short], Times(), exactly=True)
        return ids, scores

    def _in_lists(self, database: "OpenDatabase", queries: NeighborQueries, copies: Copies, wanted: int, probes: int,
                  times: Times) -> tuple[np.ndarray, np.ndarray]:
        """The best k (Q, k) of the best `wanted` rows in the nearest lists, -1 where there are fewer.

        As many queries are searched together as memory allows.
        """
        assert database.lists
        fitting = max(1, self.config.block_bytes // bytes_per_query(wanted))
        results = []
        for part in np.array_split(np.arange(len(queries)), -(-len(queries) // fitting)):
            block = queries if len(part) == len(queries) else queries[part]
            with times("choose"):
                nearest = database.lists.nearest(block.vectors, probes)
            rough = search_by_list(block.vectors, nearest, database.in_lists, wanted, times)
            with times("settle"):
                results.append(rank_candidates(rough, block, database.embeddings, copies, self.config.k))
        ids, scores = (np.concatenate(column) for column in zip(*results, strict=True))
        return ids, scores

    def _certain(self, database: "OpenDatabase", queries: NeighborQueries, candidates: Candidates, copies: Copies
                 ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of an exhaustive search; again for queries where a row that was passed over may be nearer."""
        k, width = self.config.k, candidates.ids.shape[1]
        ids, scores = rank_candidates(candidates, queries, database.embeddings, copies, k)
        unsure = np.flatnonzero(scores[:, -1] < candidates.beyond)
        if len(unsure) and width < min(1024, len(database.embeddings)):
            wider = search_exhaustively(queries.vectors[unsure], database.embeddings,
                                      min(8 * width, 1024, len(database.embeddings)), self.config.block_bytes)
            ids[unsure], scores[unsure] = rank_candidates(wider, queries[unsure], database.embeddings, copies, k)
            unsure = unsure[scores[unsure, -1] < wider.beyond]
        if len(unsure):
            ids[unsure], scores[unsure] = search_all_rows(queries[unsure], database.embeddings, copies, k,
                                                        self.config.block_bytes)
        return ids, scores

    def _quality(self, database: "OpenDatabase", queries: NeighborQueries, ids: np.ndarray, there: np.ndarray,
                 item: Item) -> dict[str, int]:
        """How many of a few samples' exact neighbors were found."""
        if not (database.lists or database.graph):
            return {}
        parts, start = [np.empty(0, np.int64)], 0
        for shard in item.inputs["shards"]:
            end = start + shard["shard"]["samples"]
            here = there[(there >= start) & (there < end)]
            rng = np.random.default_rng((29, item.inputs["offset"] + start))
            parts.append(np.sort(rng.choice(here, min(shard["checked"], len(here)), replace=False)))
            start = end
        chosen = np.concatenate(parts)
        if not len(chosen):
            return {}
        exact, _ = self._found(database, queries[chosen], Times(), exactly=True)
        agreed = sum(len(np.intersect1d(expected[expected >= 0], actual))
                     for expected, actual in zip(exact, ids[chosen], strict=True))
        return {"checked": int((exact >= 0).sum()), "agreed": agreed}

    def _usage(self, records: Sequence[dict[str, Any]]) -> np.ndarray:
        """How often each row of the database is a neighbor, (M,) int64: p_D of the paper, not normalized."""
        usage = np.zeros(self.database.manifest("embeddings")["totals"]["samples"], np.int64)

        def read(entry: dict[str, Any]) -> np.ndarray:
            return arrays.load_array(storage.fetch(storage.file_below(self.folder, entry["name"]), entry))

        entries = neighbor_files(records, ".ids.npy")
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(entries), 8):
                for ids in pool.map(read, entries[start:start + 8]):
                    rows, counts = np.unique(ids[ids >= 0], return_counts=True)
                    usage[rows] += counts
        return usage


class OpenDatabase:
    """A database as a worker keeps it from item to item."""

    def __init__(self, database: Dataset, method: str, hashed: bool, digest: str, where: str) -> None:
        started = time.perf_counter()
        self.embeddings = Embeddings(database)
        records = database.manifest("shards")["items"]
        kind = searcher.search_kind(database) if method == "index" else "scan"
        self.hidden = np.zeros(len(self.embeddings), bool)
        self.hidden[hidden_rows.read_hidden_rows(database)] = True
        if where:
            self.hidden |= ~RowSelection(database, where).mask()
            if self.hidden.all():
                raise ValueError(f"{where} leaves nothing of {database.label} to be a neighbor: expected at least one "
                                 f"of {len(self.hidden)} rows, got none\nhint: status lists the scores; another limit")
        left_out = np.flatnonzero(self.hidden) if where else None
        self.graph = Searcher(database, left_out) if kind == "graph" else None
        self.lists = IndexLists(database) if kind == "lists" else None

        def fill(folder: Path) -> None:
            np.save(folder / "labels.npy", np.concatenate([labels(database, record) for record in records]))
            if hashed:
                np.save(folder / "hashes.npy", np.concatenate([perceptual_hashes(database, record)
                                                               for record in records]))
            if self.lists:
                # This index is opened only here, so that its memory is freed afterwards.
                _write_in_list_order(folder, self.embeddings, IndexLists(database), left_out)

        self._folder = shared_scratch(f"neighbors-{digest[:24]}{'-hashed' * hashed}", fill)
        self.labels = arrays.map_array(self._folder / "labels.npy")
        self.hashes = arrays.map_array(self._folder / "hashes.npy") if hashed else None
        if len(self.labels) != len(self.embeddings):
            raise DamagedFile(f"{database.label} has {len(self.embeddings)} vectors of {len(self.labels)} samples\n"
                              f"hint: python -m jobs verify")
        if self.lists:
            self._ends = arrays.load_array(self._folder / "ends.npy")
        self.seconds = time.perf_counter() - started  # that it took, until an item has counted them

    def in_lists(self, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The rows of some lists, in their order: (list, ids (n,), vectors (n, D) float16)."""
        dim = self.embeddings.dim
        with open(self._folder / "vectors", "rb") as vectors, open(self._folder / "ids", "rb") as ids:
            for number in wanted:
                start, end = int(self._ends[number]), int(self._ends[number + 1])
                ids.seek(8 * start)
                vectors.seek(2 * dim * start)
                yield (int(number), np.fromfile(ids, np.int64, end - start),
                       np.fromfile(vectors, np.float16, (end - start) * dim).reshape(-1, dim))


def _write_in_list_order(folder: Path, embeddings: Embeddings, lists: IndexLists, left_out: np.ndarray | None = None
                         ) -> None:
    """The vectors of a database list after list in one file, so that a list is read in one piece.

    The rows `left_out` are in no list: a filter that keeps few rows would leave none of the candidates.

    They are read in their order and put into one file for some lists each, which fit into memory.
    """
    list_of = np.lib.format.open_memmap(folder / "lists.npy", "w+", np.int32, (len(embeddings),))
    for number in range(lists.count):
        list_of[lists.ids(number)] = number
    files = max(1, -(-len(embeddings) * embeddings.dim * 2 // _LAID))
    per_file = -(-lists.count // files)
    rough = [(folder / f"vectors{number}", folder / f"ids{number}") for number in range(files)]
    for first, rows in embeddings.blocks(_LAID // 4 // (2 * embeddings.dim)):
        there = np.flatnonzero(_nonzero_rows(rows))
        if left_out is not None:
            there = np.setdiff1d(there, left_out - first, assume_unique=True)
        goal = list_of[first:first + len(rows)][there] // per_file
        for number in np.unique(goal):
            selected = there[goal == number]
            with open(rough[number][0], "ab") as vectors, open(rough[number][1], "ab") as ids:
                rows[selected].tofile(vectors)
                (first + selected).tofile(ids)
    counts = np.zeros(lists.count, np.int64)
    with open(folder / "vectors", "wb") as vectors, open(folder / "ids", "wb") as ids:
        for paths in rough:
            if not paths[0].exists():
                continue
            numbers = np.fromfile(paths[1], np.int64)
            goal = list_of[numbers]
            order = np.argsort(goal, kind="stable")
            rows = np.fromfile(paths[0], np.float16).reshape(-1, embeddings.dim)
            for start in range(0, len(order), _WRITTEN):
                rows[order[start:start + _WRITTEN]].tofile(vectors)
            numbers[order].tofile(ids)
            counts += np.bincount(goal, minlength=lists.count)
            for path in paths:
                path.unlink()
    np.save(folder / "ends.npy", np.cumsum([0, *counts]))
    (folder / "lists.npy").unlink()


def _nonzero_rows(rows: np.ndarray) -> np.ndarray:
    """Which rows (N, D) float16 are not all zero: `rows.any(1)`, which takes its time for half precision."""
    there = rows[:, 0] != 0
    unsure = np.flatnonzero(~there)
    there[unsure] = rows[unsure].any(1)
    return there


@lru_cache(maxsize=1)
def _open_database(database: Dataset, method: str, hashed: bool, digest: str, where: str) -> OpenDatabase:
    """The database, kept in this worker; `digest` tells rebuilds apart."""
    return OpenDatabase(database, method, hashed, digest, where)


def _score_facts(ids: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    there = scores[ids >= 0]
    return {"missing": int((ids < 0).sum()), "scores": np.histogram(there.clip(-1, 1), SCORE_BINS)[0].tolist(),
            "mean_similarity": round(float(there.mean()), 4) if len(there) else None}


def _write_vectors(path: Path, embeddings: Embeddings, ids: np.ndarray) -> None:
    """The vectors of the rows `ids` (N, k) as a file (N, k, D) float16; zeros for none."""
    out = np.lib.format.open_memmap(path, "w+", np.float16, (*ids.shape, embeddings.dim))
    for start in range(0, len(ids), _WRITTEN):
        out[start:start + _WRITTEN] = embeddings.rows(ids[start:start + _WRITTEN], once=True)
    out.flush()
