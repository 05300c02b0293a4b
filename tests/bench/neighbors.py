"""Neighbours of many queries, beside `index.search` of the same index, and exact search beside bare matrix products.

    python tests/bench/neighbors.py [--rows 1000000] [--queries 200000] [--dim 512] [--key KEY] [--work FOLDER]

The rows are clustered unit vectors (100 to a cluster, cosine about 0.7 to its centre), the queries others of the same
clusters. faiss is given the queries in batches of 1,024, at the search effort that the index was tuned to, with all
threads; ours is the stage `neighbors` at the same number of lists, in one process, from files to files. Recall is that
of 1,000 queries against exact search in float32. The exact search is that of the stage too, for the first 8,192
queries; the bare products are those of its blocks in the same precision, over and over. Prints two Markdown tables.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import photographs
from download import CHECKOUT, machine, measured, versions

sys.path.insert(0, str(CHECKOUT))  # for a checkout that was not installed
sys.path.insert(0, str(CHECKOUT / "tests" / "pipeline"))
import made

from pipeline import index, neighbors, search, stage
from pipeline.dataset import Dataset, Embeddings

_K = 20
_SHARD = 10_000
_BATCH = 1024
_JUDGED = 1000
_EXACT = 8192


def clustered(count: int, dim: int, clusters: int, seed: int) -> np.ndarray:
    """Unit vectors (count, dim) float16 around the same random centres whatever the seed."""
    centres = np.random.default_rng(0).normal(size=(clusters, dim)).astype(np.float32)
    rng = np.random.default_rng((1, seed))
    out = np.empty((count, dim), np.float16)
    for start in range(0, count, _SHARD):
        size = min(_SHARD, count - start)
        vectors = centres[rng.integers(clusters, size=size)] + rng.standard_normal((size, dim), np.float32)
        out[start:start + size] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return out


def filled(work: Path, rows: int, queries: int, dim: int, key: str) -> tuple[Dataset, Dataset]:
    """The sealed queries and database, the latter with an index of that kind."""
    root = work / f"neighbors-{rows}-{queries}-{dim}-{key}"
    encoder = made.ENCODER | {"dim": dim}
    datasets = []
    for seed, (name, count) in enumerate((("queries", queries), ("database", rows))):
        dataset = Dataset.parse(str(root), name)
        if not dataset.sealed("embeddings"):
            print(f"making {count} vectors", file=sys.stderr)
            vectors = clustered(count, dim, max(10, rows // 100), seed)
            made.given(root, name, np.split(vectors, range(_SHARD, count, _SHARD)), encoder=encoder)
        datasets.append(dataset)
    if not datasets[1].sealed("index"):
        from pipeline import assembly
        print("making the index", file=sys.stderr)
        assembly.run(index.Index(datasets[1], index.IndexConfig(key=key, max_memory="100G", train_points=160_000)),
                     stage.run)
    return datasets[0], datasets[1]


def peer(queries: Dataset, database: Dataset, out: Path) -> None:
    """All queries through `index.search`, batch by batch; prints the seconds, with and without loading."""
    import faiss
    begin = time.perf_counter()
    opened = index.Searcher(database)
    vectors = Embeddings(queries).all()
    loaded = time.perf_counter()
    found = [opened.index.search(vectors[start:start + _BATCH].astype(np.float32), _K)[1]
             for start in range(0, len(vectors), _BATCH)]
    np.save(out, np.concatenate(found))
    print(json.dumps({"work": time.perf_counter() - loaded, "all": time.perf_counter() - begin,
                      "threads": faiss.omp_get_max_threads()}))


def ours(queries: Dataset, database: Dataset, out: Path) -> None:
    """The stage in this process; prints the seconds of its items, and all."""
    begin = time.perf_counter()
    config = neighbors.NeighborsConfig(k=_K, copy_similarity=2.0, checked=0)
    manifest = stage.run(neighbors.Neighbors(queries, database, config), rebuild=True)
    np.save(out, np.concatenate(neighbors.load(queries, database)))
    print(json.dumps({"work": manifest["run"]["seconds"], "all": time.perf_counter() - begin,
                      "first": manifest["items"][0]["run"]["seconds"]}))


def exact(queries: Dataset, database: Dataset, turns: int) -> list[tuple[float, float, float]]:
    """(exhaustive search, with ranking, bare products) in 10^9 multiply-adds and additions a second, turn by turn."""
    import torch
    device, dtype = search.where()
    vectors, rows = Embeddings(queries).all()[:_EXACT].astype(np.float32), Embeddings(database)
    memory = neighbors.NeighborsConfig().block_bytes
    blocks = search.Blocks(len(vectors), rows.dim, memory, device.type)
    work = 2.0 * len(vectors) * len(rows) * rows.dim
    one = torch.randn(blocks.rows, rows.dim, device=device).to(dtype)
    other = torch.randn(blocks.queries, rows.dim, device=device).to(dtype)
    labels = np.arange(len(rows), dtype=np.uint64)[:, None]
    asked = search.Queries(vectors, np.full(len(vectors), -1), labels[:len(vectors)] + np.uint64(1 << 40))
    found = []
    for _ in range(turns):
        begin = time.perf_counter()
        rough = search.exhaustive(vectors, rows, 4 * _K + 20, memory)
        searched = time.perf_counter()
        search.settle(rough, asked, rows, search.Copies(labels, 2.0), _K)
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
    asked = index.Queries("image", vectors[chosen].astype(np.float32))
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
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--part", default="", choices=["", "peer", "ours"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = photographs.work_folder(given.work)
    queries, database = filled(work, given.rows, given.queries, given.dim, given.key)
    if given.part:
        (peer if given.part == "peer" else ours)(queries, database, work / f"neighbors-{given.part}.npy")
        return 0
    told: dict[str, list[tuple[float, float, float]]] = {"peer": [], "ours": []}
    for _ in range(given.repeats):
        for who in told:
            usage = measured([sys.executable, __file__, "--part", who, "--rows", str(given.rows), "--queries",
                              str(given.queries), "--dim", str(given.dim), "--key", given.key, "--work",
                              given.work], work / f"neighbors-{who}.log")
            said = json.loads(usage.stdout.splitlines()[-1])
            told[who].append((said["work"], said["all"], usage.peak_mb))
    opened = Embeddings(database)
    vectors = Embeddings(queries).all()
    info = database.manifest("index")["info"]
    print(f"{given.queries} queries among {given.rows} x {given.dim}, k = {_K}; index {info['key']}, "
          f"{info['parameter']}, {info['bytes'] / 2**20:.0f} MB; {given.repeats} runs each in turns; {machine()}; "
          f"{versions()}\n")
    print("| | queries/s | with opening and writing | recall@20 | peak memory (PSS), MB |\n|---|---|---|---|---|")
    for who, name in (("peer", "`index.search`"), ("ours", "neighbors")):
        seconds, all_, peak = (statistics.median(column) for column in zip(*told[who], strict=True))
        hit = recall(np.load(work / f"neighbors-{who}.npy"), vectors, opened)
        print(f"| {name} | {given.queries / seconds:.0f} | {given.queries / all_:.0f} | {hit:.4f} | {peak:.0f} |")
    rates = exact(queries, database, 3)
    searched, settled, bare = (statistics.median(column) for column in zip(*rates, strict=True))
    share = statistics.median(one[1] / one[2] for one in rates)
    print(f"\n| | GFLOP/s |\n|---|---|\n| exact search of {_EXACT} queries | {searched:.0f} |\n"
          f"| with leaving out copies and exact ranking | {settled:.0f} |\n"
          f"| bare products of the same blocks | {bare:.0f} |\n\nshare of the bare rate: {share:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
