"""Neighbours of many queries, beside `index.search` of the same index, and exact search beside bare matrix products.

    python tests/bench/search/neighbors.py [--rows 1000000] [--queries 200000] [--dim 512] [--key KEY]
        [--only lists|exact]

Rows and queries are the clustered unit vectors of the bench of the index, 100 to a cluster on average. faiss is given
the queries in batches of 1,024, at the search effort that the index was tuned to, with all threads; ours is the stage
`neighbors` from files to files on two Ray workers of one core each, ten shards of 10,000 queries at once, at the same
number of lists, at half as many, and at a quarter.
Recall is that of 1,000 queries against exact search in float32. The exact search is that of the stage too, for the
first 8,192 queries; the bare products are those of its blocks in the same precision, over and over. Prints two Markdown
tables.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from harness import CHECKOUT, Usage, machine, measured, versions
from vectors import clustered

sys.path.insert(0, str(CHECKOUT / "tests/pipeline"))
import synthetic

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices import index
from pipeline.indices.config import IndexConfig
from pipeline.indices.searcher import Searcher
from pipeline.indices.tune import RecallQueries
from pipeline.neighbors import rank
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.exhaustive import BlockSizes, search_device, search_exhaustively
from pipeline.neighbors.files import load_neighbors
from pipeline.stages.driver import run_stage

_K = 20
_SHARD = 10_000
_BATCH = 1024
_JUDGED = 1000
_EXACT = 8192


def filled(work: Path, rows: int, queries: int, dim: int, key: str) -> tuple[Dataset, Dataset]:
    """The sealed queries and database, the latter with an index of that kind."""
    root = work / f"neighbors-of-{rows}-{queries}-{dim}-{key}"
    encoder = synthetic.ENCODER | {"dim": dim}
    datasets = []
    for seed, (name, count) in enumerate((("database", rows), ("queries", queries))):
        dataset = Dataset.parse(str(root), name)
        if not dataset.is_sealed("embeddings"):
            print(f"making {count} vectors", file=sys.stderr)
            vectors = [clustered(min(_SHARD, count - first), dim, max(10, rows // 100), (seed << 32) + first)
                       .astype(np.float16) for first in range(0, count, _SHARD)]
            synthetic.given(root, name, vectors, encoder=encoder)
        datasets.append(dataset)
    if not datasets[0].is_sealed("index"):
        from pipeline.indices.index import build_index
        print("making the index", file=sys.stderr)
        build_index(index.Index(datasets[0], IndexConfig(key=key, max_memory="100Gi", train_points=160_000)),
                     run_stage)
    return datasets[1], datasets[0]


def peer(queries: Dataset, database: Dataset, out: Path) -> None:
    """All queries through `index.search`, batch by batch; prints the seconds, with and without loading."""
    import faiss
    begin = time.perf_counter()
    opened = Searcher(database)
    vectors = Embeddings(queries).all()
    loaded = time.perf_counter()
    found = [opened.index.search(vectors[start:start + _BATCH].astype(np.float32), _K)[1]
             for start in range(0, len(vectors), _BATCH)]
    np.save(out, np.concatenate(found))
    print(json.dumps({"work": time.perf_counter() - loaded, "all": time.perf_counter() - begin,
                      "threads": faiss.omp_get_max_threads()}))


def exact(queries: Dataset, database: Dataset, turns: int) -> list[tuple[float, float, float]]:
    """(exhaustive search, with ranking, bare products) in 10^9 multiply-adds and additions a second, turn by turn."""
    import torch
    device, dtype = search_device()
    vectors, rows = Embeddings(queries).all()[:_EXACT].astype(np.float32), Embeddings(database)
    memory = NeighborsConfig().block_bytes
    blocks = BlockSizes(len(vectors), rows.dim, memory, device.type)
    work = 2.0 * len(vectors) * len(rows) * rows.dim
    one = torch.randn(blocks.rows, rows.dim, device=device).to(dtype)
    other = torch.randn(blocks.queries, rows.dim, device=device).to(dtype)
    labels = np.arange(len(rows), dtype=np.uint64)[:, None]
    asked = rank.NeighborQueries(vectors, np.full(len(vectors), -1), labels[:len(vectors)] + np.uint64(1 << 40))
    found = []
    for _ in range(turns):
        begin = time.perf_counter()
        rough = search_exhaustively(vectors, rows, 4 * _K + 20, memory)
        searched = time.perf_counter()
        rank.rank_candidates(rough, asked, rows, rank.Copies(labels, 2.0), _K)
        settled = time.perf_counter()
        times = max(1, round(work / (2.0 * blocks.rows * blocks.queries * rows.dim)))
        for _ in range(times):
            torch.mm(one, other.T)
        if device.type == "cuda":
            torch.cuda.synchronize()
        bare = time.perf_counter() - settled
        done = times * 2.0 * blocks.rows * blocks.queries * rows.dim
        found.append((work / (searched - begin) / 1e9, work / (settled - begin) / 1e9, done / bare / 1e9))
    return found


def recall(found: np.ndarray, vectors: np.ndarray, database: Embeddings) -> float:
    """Share of the exact 20 neighbours of some queries that were found."""
    chosen = np.random.default_rng(5).choice(len(vectors), min(_JUDGED, len(vectors)), replace=False)
    asked = RecallQueries("image", vectors[chosen].astype(np.float32))
    for first, rows in database.blocks(50_000):
        asked.look(rows.astype(np.float32), first)
    hits = [len(np.intersect1d(one, other)) for one, other in zip(asked.ids[:, :_K], found[chosen], strict=True)]
    return float(np.mean(hits)) / _K


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--key", default="IVF4096_HNSW32,PQ128x8")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("lists", "exact"), help="leave the other out")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = photographs.work_folder(given.work)
    queries, database = filled(work, given.rows, given.queries, given.dim, given.key)
    if given.peer:
        peer(queries, database, work / "neighbors-peer.npy")
        return 0
    print(f"{given.queries} queries among {given.rows} x {given.dim}, k = {_K}; {given.repeats} runs each in turns; "
          f"{machine()}; {versions()}\n")
    if given.only != "exact":
        lists(queries, database, given, work)
    if given.only != "lists":
        exactly(queries, database, given.repeats)
    return 0


def lists(queries: Dataset, database: Dataset, given: argparse.Namespace, work: Path) -> None:
    """Run both by turns and print the table."""
    info = database.manifest("index")["info"]
    tuned = int(info["parameter"].partition("=")[2])
    opened, vectors = Embeddings(database), Embeddings(queries).all()
    told: dict[str, list[tuple[float, float, float, float]]] = {}

    def note(name: str, work_s: float, usage: Usage, found: np.ndarray) -> None:
        told.setdefault(name, []).append((work_s, usage.wall_s, recall(found, vectors, opened), usage.peak_mb))
        print(name, told[name][-1], f"{usage.others_cores:.2f} cores busy with something else", file=sys.stderr,
              flush=True)

    for _ in range(given.repeats):
        usage = measured([sys.executable, __file__, "--peer", "--rows", str(given.rows), "--queries",
                          str(given.queries), "--dim", str(given.dim), "--key", given.key, "--work", given.work],
                         work / "neighbors-peer.log")
        note(f"`index.search`, {tuned} lists", json.loads(usage.stdout.splitlines()[-1])["work"], usage,
             np.load(work / "neighbors-peer.npy"))
        for probes in (tuned, tuned // 2, tuned // 4):
            usage = measured([sys.executable, "-m", "jobs", "neighbors", queries.label, "--database", database.label,
                              "--root", database.root, "--k", str(_K), "--copy-similarity", "2", "--checked", "0",
                              "--at-once", "10", "--probes", str(probes), "--workers", "2", "--overwrite"],
                             work / "neighbors-ours.log")
            records = queries.manifest(f"neighbors/{database.label}")["items"]
            note(f"neighbors, {probes} lists", sum(record["run"]["seconds"] for record in records) / 2, usage,
                 np.concatenate(load_neighbors(queries, database)))
    print(f"index {info['key']}, {info['parameter']}, {info['bytes'] / 2**20:.0f} MB\n")
    print("| | queries/s | whole command | recall@20 | peak memory (PSS), MB |\n|---|---|---|---|---|")
    for name, runs in told.items():
        seconds, all_, hit, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {name} | {given.queries / seconds:.0f} | {given.queries / all_:.0f} | {hit:.4f} | {peak:.0f} |")


def exactly(queries: Dataset, database: Dataset, turns: int) -> None:
    """Measure the exact search and print the table."""
    rates = exact(queries, database, turns)
    searched, settled, bare = (statistics.median(column) for column in zip(*rates, strict=True))
    share = statistics.median(one[1] / one[2] for one in rates)
    print(f"\n| | GFLOP/s |\n|---|---|\n| exact search of {_EXACT} queries | {searched:.0f} |\n"
          f"| with leaving out copies and exact ranking | {settled:.0f} |\n"
          f"| bare products of the same blocks | {bare:.0f} |\n\nshare of the bare rate: {share:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
