"""Recall, seconds and memory of building an index, compared with autofaiss's build_index.

    python tests/bench/search/index.py [--vectors 500000] [--memory 100M] [--repeats 3] [--work FOLDER]

Both read the same sealed embeddings: clustered unit vectors as float16, made from a seed. Both have the same memory
limit for the index; with the default they choose the same kind. autofaiss runs on one core and on two, and otherwise
with its defaults. Recall compares new queries with exact search, once with the effort that each builder chose, and once
with the same effort. The runs take turns. Prints a Markdown table of medians; index.json in the work folder has every
run. Exit 1 if a build ends without an index.
"""

import argparse
import importlib.metadata
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from harness import Failed, Usage, machine, measure, versions
from vectors import clustered

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.stages.driver import run_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

_PER_SHARD = 10_000
_QUERIES = 1000
_SAME_EFFORT = 32
_DEPTH = 10
_NAME = "bench"


@dataclass
class Result:
    """One build, and the recall of its index."""

    who: str
    wall_s: float
    cpu_s: float
    peak_mb: float
    others_cores: float
    key: str
    parameter: str
    bytes: int
    recall: float
    recall_same_effort: float
    query_ms: float


class Clustered(Stage):
    """Embeddings of images that there are not: unit vectors around seeded centers, in shards."""

    name = "embed"

    def __init__(self, dataset: Dataset, count: int, dim: int, clusters: int) -> None:
        super().__init__(dataset.root, dataset.path("embeddings"), None)
        self.count, self.dim, self.clusters = count, dim, clusters

    def section(self) -> dict[str, Any]:
        return {"count": self.count, "dim": self.dim, "clusters": self.clusters}

    def plan(self) -> list[Item]:
        return [Item(f"{first // _PER_SHARD:06d}", {"first": first, "count": min(_PER_SHARD, self.count - first)})
                for first in range(0, self.count, _PER_SHARD)]

    def process(self, item: Item, scratch: Path) -> Output:
        path = scratch / f"{item.id}.npy"
        vectors = clustered(item.inputs["count"], self.dim, self.clusters, item.inputs["first"])
        np.save(path, vectors.astype(np.float16), allow_pickle=False)
        return Output(samples=len(vectors), files={path.name: path})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": {"model": "clustered", "dim": self.dim}})


def exact_neighbors(dataset: Dataset, queries: np.ndarray) -> np.ndarray:
    """The ids of the nearest rows of every query, (Q, 10)."""
    from pipeline.indices.tune import RecallQueries
    recall_queries, embeddings = RecallQueries("image", queries), Embeddings(dataset)
    for offset, shard in zip(embeddings.offsets[:-1], embeddings.shards, strict=True):
        recall_queries.look(np.asarray(shard, np.float32), int(offset))
    return recall_queries.ids[:, :_DEPTH]


def measure_index(path: Path, queries: np.ndarray, nearest: np.ndarray) -> dict[str, Any]:
    """recall@10 of an index as its builder left it, milliseconds a query, and recall@10 with the effort of all."""
    import faiss
    index = faiss.read_index(str(path))

    def recall() -> float:
        neighbor_ids = index.search(queries, _DEPTH)[1]
        return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(nearest, neighbor_ids, strict=True)]) / _DEPTH)

    begin = time.perf_counter()
    own = recall()
    seconds = time.perf_counter() - begin
    lists = faiss.try_extract_index_ivf(index)
    parameter = f"nprobe={lists.nprobe}" if lists else ""
    if lists:
        lists.nprobe = _SAME_EFFORT
    return {"recall": round(own, 4), "query_ms": round(1e3 * seconds / len(queries), 3), "parameter": parameter,
            "recall_same_effort": round(recall(), 4), "bytes": path.stat().st_size}


def _peer(folder: str, out: str, memory: str, cores: int) -> None:
    """Build with autofaiss and write the index; prints the key that autofaiss chose."""
    import faiss
    from autofaiss import build_index

    # autofaiss would also write metrics as JSON, which fails with the float32 values that numpy 2 gives.
    index, infos = build_index(folder, save_on_disk=False, max_index_memory_usage=memory, nb_cores=cores)
    faiss.write_index(index, f"{out}/knn.index")
    print(json.dumps(infos["index_key"]))


def peer(dataset: Dataset, out: Path, memory: str, cores: int) -> tuple[str, Usage, Path, str]:
    """autofaiss on `cores` cores: its name, its use of resources, and the path and kind of its index."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    usage = measure(["env", f"OMP_NUM_THREADS={cores}", sys.executable, __file__, "--peer",
                     dataset.folder("embeddings"), "--out", str(out), "--memory", memory, "--cores", str(cores)],
                    out.with_suffix(".log"))
    key = json.loads(usage.stdout.splitlines()[-1])
    return f"autofaiss, {cores} core{'s' if cores > 1 else ''}", usage, out / "knn.index", key


def ours(dataset: Dataset, memory: str, cores: int, workers: int) -> tuple[str, Usage, Path, str]:
    """The stage in one process with so many threads, or on Ray workers of one core each."""
    folder = Path(dataset.folder("index"))
    for name in ("index", "index-training", "index-parts"):
        shutil.rmtree(dataset.folder(name), ignore_errors=True)
    worker_flags = ["--local"] if not workers else ["--workers", str(workers)]
    prefix = ["env", f"OMP_NUM_THREADS={cores}"] if not workers else []
    usage = measure([*prefix, sys.executable, "-m", "jobs", "index", _NAME, "--root", dataset.root, "--max-memory",
                     f"{memory}i", *worker_flags], folder.with_suffix(".log"))
    who = f"ours, {workers} workers" if workers else f"ours, --local, {cores} core{'s' if cores > 1 else ''}"
    return who, usage, folder / "knn.index", dataset.manifest("index")["info"]["key"]


def table(results: list[Result]) -> str:
    """Medians as a Markdown table."""
    names = list(dict.fromkeys(result.who for result in results))
    lines: list[tuple[str, str, Callable[[Result], float]]] = [
        ("seconds, whole command", ".0f", lambda result: result.wall_s),
        ("CPU seconds", ".0f", lambda result: result.cpu_s),
        ("peak memory (PSS), MB", ".0f", lambda result: result.peak_mb),
        ("recall@10, own effort", ".4f", lambda result: result.recall),
        (f"recall@10, nprobe {_SAME_EFFORT}", ".4f", lambda result: result.recall_same_effort),
        ("ms a query, own effort", ".2f", lambda result: result.query_ms),
        ("index, MB", ".1f", lambda result: result.bytes / 1e6),
        ("cores busy with something else", ".2f", lambda result: result.others_cores)]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for title, form, value in lines:
        rows.append([title, *(f"{statistics.median(value(result) for result in results if result.who == name):{form}}"
                              for name in names)])
    for title, text in (("kind", lambda result: result.key), ("own effort", lambda result: result.parameter)):
        rows.append([title, *(", ".join(sorted({text(result) for result in results if result.who == name}))
                              for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=4000)
    parser.add_argument("--memory", default="100M", help="that the index may have")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="of those that run in one process")
    parser.add_argument("--only", choices=("peer", "ours"), help="leave the other out")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        _peer(args.peer, args.out, args.memory, args.cores[0])
        return 0
    work = photographs.work_folder(args.work)
    dataset = Dataset(str(work / f"vectors-of-{args.vectors}-{args.dim}-{args.clusters}"), _NAME)
    run_stage(Clustered(dataset, args.vectors, args.dim, args.clusters))
    queries = clustered(_QUERIES, args.dim, args.clusters, seed=1 << 40)
    nearest = exact_neighbors(dataset, queries)
    runs: list[Callable[[], tuple[str, Usage, Path, str]]] = []
    if args.only != "peer":
        runs += [lambda cores=cores: ours(dataset, args.memory, cores, 0) for cores in args.cores]
        runs += [lambda: ours(dataset, args.memory, 0, 2)]
    if args.only != "ours":
        runs += [lambda cores=cores: peer(dataset, work / "autofaiss", args.memory, cores) for cores in args.cores]
    results: list[Result] = []
    try:
        for _ in range(args.repeats):
            for run in runs:
                who, usage, path, key = run()
                results.append(Result(who, round(usage.wall_s, 2), round(usage.cpu_s, 2), round(usage.peak_mb, 1),
                                      round(usage.others_cores, 2), key=key, **measure_index(path, queries, nearest)))
                print(json.dumps(asdict(results[-1])), file=sys.stderr, flush=True)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    program_versions = f"{versions()}; autofaiss {importlib.metadata.version('autofaiss')}"
    document = {"machine": machine(), "versions": program_versions, "vectors": args.vectors,
                "runs": [asdict(result) for result in results]}
    (work / "index.json").write_text(json.dumps(document, indent=1))
    print(f"{args.vectors} x {args.dim}, {args.memory} for the index, {args.repeats} runs each in turns; "
          f"{machine()}; {program_versions}\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
