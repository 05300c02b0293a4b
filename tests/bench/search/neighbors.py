"""Speed of the neighbors stage, compared with faiss's `index.search`, and of exact search with bare matrix products.

    python tests/bench/search/neighbors.py [--rows 1000000] [--queries 200000] [--dim 512] [--key KEY]
        [--only lists|exact]

Rows and queries are the clustered unit vectors of the bench of the index, 100 to a cluster on average.

* faiss gets the queries in batches of 1,024, at the search effort that the index was tuned to, with all threads.
* Ours is the stage `neighbors` from files to files on two Ray workers of one core each. An item has ten shards of
  10,000 queries. It searches the same number of lists, half as many, and a quarter.

Recall compares 1,000 queries with exact search in float32. The exact search is the stage's too, for the first 8,192
queries. The bare products are those of its blocks in the same precision, repeated. Prints two Markdown tables.
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
from harness import CHECKOUT, Usage, machine, measure, versions
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


def make_datasets(work: Path, rows: int, queries: int, dim: int, key: str) -> tuple[Dataset, Dataset]:
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
            synthetic.vector_dataset(root, name, vectors, encoder=encoder)
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
    searcher = Searcher(database)
    vectors = Embeddings(queries).all()
    loaded = time.perf_counter()
    neighbor_ids = [searcher.index.search(vectors[start:start + _BATCH].astype(np.float32), _K)[1]
                    for start in range(0, len(vectors), _BATCH)]
    np.save(out, np.concatenate(neighbor_ids))
    print(json.dumps({"work": time.perf_counter() - loaded, "all": time.perf_counter() - begin,
                      "threads": faiss.omp_get_max_threads()}))


def exact_rates(queries: Dataset, database: Dataset, turns: int) -> list[tuple[float, float, float]]:
    """(exhaustive search, with ranking, bare products) in 10^9 multiply-adds and additions a second, turn by turn."""
    import torch
    device, dtype = search_device()
    vectors, rows = Embeddings(queries).all()[:_EXACT].astype(np.float32), Embeddings(database)
    memory = NeighborsConfig().block_bytes
    blocks = BlockSizes(len(vectors), rows.dim, memory, device.type)
    work = 2.0 * len(vectors) * len(rows) * rows.dim
    row_block = torch.randn(blocks.rows, rows.dim, device=device).to(dtype)
    query_block = torch.randn(blocks.queries, rows.dim, device=device).to(dtype)
    labels = np.arange(len(rows), dtype=np.uint64)[:, None]
    neighbor_queries = rank.NeighborQueries(vectors, np.full(len(vectors), -1),
                                            labels[:len(vectors)] + np.uint64(1 << 40))
    rates = []
    for _ in range(turns):
        begin = time.perf_counter()
        candidates = search_exhaustively(vectors, rows, 4 * _K + 20, memory)
        search_end = time.perf_counter()
        rank.rank_candidates(candidates, neighbor_queries, rows, rank.Copies(labels, 2.0), _K)
        rank_end = time.perf_counter()
        times = max(1, round(work / (2.0 * blocks.rows * blocks.queries * rows.dim)))
        for _ in range(times):
            torch.mm(row_block, query_block.T)
        if device.type == "cuda":
            torch.cuda.synchronize()
        product_s = time.perf_counter() - rank_end
        product_operations = times * 2.0 * blocks.rows * blocks.queries * rows.dim
        rates.append((work / (search_end - begin) / 1e9, work / (rank_end - begin) / 1e9,
                      product_operations / product_s / 1e9))
    return rates


def recall(neighbor_ids: np.ndarray, vectors: np.ndarray, database: Embeddings) -> float:
    """Share of the exact 20 neighbors of some queries that were found."""
    chosen = np.random.default_rng(5).choice(len(vectors), min(_JUDGED, len(vectors)), replace=False)
    recall_queries = RecallQueries("image", vectors[chosen].astype(np.float32))
    for first, rows in database.blocks(50_000):
        recall_queries.look(rows.astype(np.float32), first)
    hits = [len(np.intersect1d(exact_row, found_row))
            for exact_row, found_row in zip(recall_queries.ids[:, :_K], neighbor_ids[chosen], strict=True)]
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
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    queries, database = make_datasets(work, args.rows, args.queries, args.dim, args.key)
    if args.peer:
        peer(queries, database, work / "neighbors-peer.npy")
        return 0
    print(f"{args.queries} queries among {args.rows} x {args.dim}, k = {_K}; {args.repeats} runs each in turns; "
          f"{machine()}; {versions()}\n")
    if args.only != "exact":
        report_lists(queries, database, args, work)
    if args.only != "lists":
        report_exact(queries, database, args.repeats)
    return 0


def report_lists(queries: Dataset, database: Dataset, args: argparse.Namespace, work: Path) -> None:
    """Run both by turns and print the table."""
    info = database.manifest("index")["info"]
    tuned = int(info["parameter"].partition("=")[2])
    rows, vectors = Embeddings(database), Embeddings(queries).all()
    figures: dict[str, list[tuple[float, float, float, float]]] = {}

    def note(name: str, work_s: float, usage: Usage, neighbor_ids: np.ndarray) -> None:
        figures.setdefault(name, []).append((work_s, usage.wall_s, recall(neighbor_ids, vectors, rows), usage.peak_mb))
        print(name, figures[name][-1], f"{usage.others_cores:.2f} cores busy with something else", file=sys.stderr,
              flush=True)

    for _ in range(args.repeats):
        usage = measure([sys.executable, __file__, "--peer", "--rows", str(args.rows), "--queries",
                         str(args.queries), "--dim", str(args.dim), "--key", args.key, "--work", args.work],
                        work / "neighbors-peer.log")
        note(f"`index.search`, {tuned} lists", json.loads(usage.stdout.splitlines()[-1])["work"], usage,
             np.load(work / "neighbors-peer.npy"))
        for probes in (tuned, tuned // 2, tuned // 4):
            usage = measure([sys.executable, "-m", "jobs", "neighbors", queries.label, "--database", database.label,
                             "--root", database.root, "--k", str(_K), "--copy-similarity", "2", "--checked", "0",
                             "--at-once", "10", "--probes", str(probes), "--workers", "2", "--overwrite"],
                            work / "neighbors-ours.log")
            records = queries.manifest(f"neighbors/{database.label}")["items"]
            note(f"neighbors, {probes} lists", sum(record["run"]["seconds"] for record in records) / 2, usage,
                 np.concatenate(load_neighbors(queries, database)))
    print(f"index {info['key']}, {info['parameter']}, {info['bytes'] / 2**20:.0f} MB\n")
    print("| | queries/s | whole command | recall@20 | peak memory (PSS), MB |\n|---|---|---|---|---|")
    for name, runs in figures.items():
        seconds, wall_s, hit, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {name} | {args.queries / seconds:.0f} | {args.queries / wall_s:.0f} | {hit:.4f} | {peak:.0f} |")


def report_exact(queries: Dataset, database: Dataset, turns: int) -> None:
    """Measure the exact search and print the table."""
    rates = exact_rates(queries, database, turns)
    search_rate, ranked_rate, product_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    share = statistics.median(turn_rates[1] / turn_rates[2] for turn_rates in rates)
    print(f"\n| | GFLOP/s |\n|---|---|\n| exact search of {_EXACT} queries | {search_rate:.0f} |\n"
          f"| with leaving out copies and exact ranking | {ranked_rate:.0f} |\n"
          f"| bare products of the same blocks | {product_rate:.0f} |\n\nshare of the bare rate: {share:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
