"""What a billion rows cost the driver: planning, items, manifests and going on, measured at up to ten million.

    python tests/bench/data/scale.py [--small] [--only plan driver workers lists] [--work FOLDER]

Each measurement runs in a process of its own, so that its peak of memory is its own. Prints Markdown tables, and from
the measured constants a table for 100 million and 5 billion rows. --small takes a hundredth of everything, to see that
it runs. Everything is in scale.json in the work folder.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from harness import CHECKOUT

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages import records
from pipeline.stages.driver import Runner, run_in_process, run_stage
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import item_ids, prepare
from pipeline.stages.seal import _pack, read_records, seal_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

ROWS_PER_SHARD = 10_000
GROUP = 100_000
WHERE = "punsafe < 0.1 and AESTHETIC_SCORE > 5"
LISTED = 1000  # names that an object store lists in one answer


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 10_000_000
    few: int = 10_000
    csv: int = 1_000_000
    trivial: int = 10_000
    pictures: int = 2000
    items: int = 1_000_000
    recorded: int = 100_000

    def small(self) -> "Sizes":
        return Sizes(*(max(value // 100, 200) for value in self.__dict__.values()))


# A list like LAION's.


def laion(path: Path, count: int) -> Path:
    """A parquet (or CSV) list of `count` rows with the columns and about the sizes of LAION's."""
    if path.exists():
        return path
    hidden = path.with_name(f".{path.name}")
    rng, writer = np.random.default_rng(count), None
    for first in range(0, count, GROUP):
        table = _laion_rows(rng, first, min(GROUP, count - first))
        writer = writer or (pq.ParquetWriter(hidden, table.schema) if path.suffix == ".parquet" else
                            pyarrow.csv.CSVWriter(hidden, table.schema))
        writer.write_table(table)
    assert writer
    writer.close()
    hidden.rename(path)
    return path


def _laion_rows(rng: np.random.Generator, first: int, count: int) -> pa.Table:
    numbers = pa.array(np.arange(first, first + count)).cast(pa.string())
    hexes = pa.array(rng.integers(1 << 60, 1 << 63, count).astype("U19"))
    words = pa.array(["a", "photo", "of", "the", "old", "red", "house", "by", "sea", "print", "poster", "vintage"])
    texts = [words.take(pa.array(rng.integers(0, len(words), count))) for _ in range(9)]
    return pa.table({
        "URL": pc.binary_join_element_wise("https://cdn", numbers, ".example.com/images/", hexes, ".jpg", ""),
        "TEXT": pc.binary_join_element_wise(*texts, " "),
        "WIDTH": rng.integers(200, 2000, count), "HEIGHT": rng.integers(200, 2000, count),
        "similarity": rng.uniform(0.28, 0.5, count), "hash": rng.integers(-1 << 62, 1 << 62, count),
        "punsafe": rng.beta(0.3, 4, count).astype(np.float32),
        "pwatermark": rng.beta(0.5, 1, count).astype(np.float32),
        "AESTHETIC_SCORE": rng.normal(5.1, 0.7, count).astype(np.float32)})


# What is measured, each in a process of its own.


def plan(work: Path, source: str, rows: int, where: str) -> dict[str, Any]:
    """Claim a folder for a list: identity, parts, plan.json."""
    with _folder(work) as root:
        config = ShardConfig(source=source, samples_per_shard=ROWS_PER_SHARD, image_size=256, where=where)
        one = Shard(Dataset.parse(str(root), "x"), config)
        begun, before = time.perf_counter(), memory()["VmRSS"]
        items = prepare(one)
        written = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        return {"rows": rows, "where": where, "items": len(items), "seconds": time.perf_counter() - begun,
                "peak_mb": memory()["VmHWM"], "before_mb": before, "plan_bytes": written}


class Trivial(Stage):
    """Items that are no work at all; what is left is what an item costs."""

    name = "trivial"

    def __init__(self, root: str, items: int) -> None:
        super().__init__(root, f"trivial-{items}", None)
        self.items = items

    def section(self) -> dict[str, Any]:
        return {}

    def plan(self) -> Iterator[Item]:
        for number in range(self.items):
            yield _item(number)

    def process(self, item: Item, scratch: Path) -> Output:
        return Output(ROWS_PER_SHARD, info={"rows": ROWS_PER_SHARD})


def driver(work: Path, items: int, workers: int) -> dict[str, Any]:
    """Trivial items, in process (0 workers) or on so many nodes of one worker each."""
    import scale  # not __main__: a class of that would be sent along with every item, by value
    with _folder(work) as root, _pool(workers) as runner:
        run_stage(scale.Trivial(str(root), 20 * max(workers, 1)), runner)  # the workers are up
        before, cpu, begun = memory()["VmRSS"], time.process_time(), time.perf_counter()
        run_stage(scale.Trivial(str(root), items), runner, watch=lambda tally: None)
        return {"workers": workers, "items": items, "seconds": time.perf_counter() - begun,
                "driver_cpu": time.process_time() - cpu, "driver_mb": memory()["VmRSS"] - before}


def shard(work: Path, pictures: int, workers: int) -> dict[str, Any]:
    """Pictures of a folder to tars, on so many nodes of one worker each."""
    with _folder(work) as root, _pool(workers) as runner:
        warm = ShardConfig(source=str(_pictures(work, 20 * workers)), samples_per_shard=10, image_size=256)
        run_stage(Shard(Dataset.parse(str(root), "warm"), warm), runner)
        config = ShardConfig(source=str(_pictures(work, pictures)), samples_per_shard=50, image_size=256,
                             resize="keep_ratio")
        begun = time.perf_counter()
        manifest = run_stage(Shard(Dataset.parse(str(root), "x"), config), runner)
        seconds = time.perf_counter() - begun
        assert manifest["totals"]["samples"] == pictures
        return {"workers": workers, "pictures": pictures, "seconds": seconds}


def lists(work: Path, items: int) -> dict[str, Any]:
    """Plan, records and manifest of so many items, written, loaded and gone on with."""
    found: dict[str, Any] = {"items": items}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        found[name] = {"seconds": time.perf_counter() - begun, "peak_mb": memory()["VmHWM"]}

    with _folder(work) as root:
        one = Trivial(str(root), items)
        with timed("plan"):
            planned = prepare(one)
        with timed("plan, loaded"):
            planned = prepare(one)
            ids = item_ids(planned)
        print_ = storage.read_json(f"{one.folder}/plan.json")["fingerprint"]
        with timed("records, collected and packed"):
            packs = storage.join(one.folder, "packs", print_[:12])
            collected = records.Collected(lambda packed: _pack(packs, packed))
            for one_id in ids:
                collected.add(_record(one_id, print_))
        with timed("records, in order"):
            done = collected.in_order(ids)
        with timed("manifest"):
            seal_stage(one, planned, done)
        del done, collected, planned
        with timed("manifest, loaded"):
            manifest = read_manifest(one.folder, "")
        with timed("content and totals"):
            assert records.content(manifest["fingerprint"], manifest["files"], manifest["items"]) == manifest["content"]
            assert records.totals(manifest["items"]) == manifest["totals"]
        with timed("every record, looked at"):
            assert sum(record["info"]["rows"] for record in manifest["items"]) == items * ROWS_PER_SHARD
        del manifest
        storage.remove(f"{one.folder}/manifest.json")
        with timed("going on"):
            run_stage(one, lambda stage_, left: iter(()))
        for name, pattern in (("plan", "items-*.parquet"), ("manifest", "manifest-*.parquet"),
                              ("records, collected and packed", "packs/*/*")):
            found[name]["bytes"] = sum(path.stat().st_size for path in Path(one.folder).glob(pattern))
    return found


def resume(work: Path, items: int, how: str) -> dict[str, Any]:
    """The records of so many items that are there, from packs or from a file each."""
    with _folder(work) as root:
        one = Trivial(str(root), items)
        ids = item_ids(prepare(one))
        print_ = storage.read_json(f"{one.folder}/plan.json")["fingerprint"]
        packs = storage.join(one.folder, "packs", print_[:12])
        collected = records.Collected(lambda packed: _pack(packs, packed) if how == "packs" else None)
        folder = Path(one.folder) / "records"
        folder.mkdir(exist_ok=True)
        for one_id in ids:
            record = _record(one_id, print_)
            (folder / f"{one_id}.json").write_bytes(storage.json_bytes(record))
            collected.add(record)
        del collected
        begun, before = time.perf_counter(), memory()["VmRSS"]
        found = read_records(one, ids)
        seconds = time.perf_counter() - begun
        assert len(found.ids) == items
        return {"items": items, "from": how, "seconds": seconds, "mb": memory()["VmRSS"] - before}


def _item(number: int) -> Item:
    """An item as a list in parquet gives it."""
    first = number * ROWS_PER_SHARD
    return Item(f"{number:06d}", {"spans": [["s3://bucket/laion/part-00000-5114fd87-297e-42b0-9d11.snappy.parquet",
                                             first, first, first + ROWS_PER_SHARD]],
                                  "count": ROWS_PER_SHARD, "filtered": 0})


def _record(item: str, print_: str) -> dict[str, Any]:
    """A record as a shard of a list has it: three files, some reasons."""
    number = int(item)
    return {"id": item, "plan": print_, "samples": 8000 + number % 1000, "info": {"rows": ROWS_PER_SHARD},
            "files": [{"name": name, "bytes": 200_000_000 + number, "sha256": hashlib.sha256(name.encode()).hexdigest()}
                      for name in (f"{item}.parquet", f"{item}.tar", f"ledger/{item}.jsonl")],
            "skipped": {"http_404": 800, "timeout": 200, "not_a_picture": 1000 - number % 1000},
            "noted": {"first_frame": 3},
            "run": {"seconds": 21.5, "host": "a-machine-in-a-rack"}}


def memory() -> dict[str, float]:
    """VmRSS now and VmHWM, its peak, in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 / 1e6 for fields in lines}


@contextmanager
def _folder(work: Path) -> Iterator[Path]:
    folder = work / f"scale-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _pool(workers: int) -> Iterator[Runner]:
    if not workers:
        yield run_in_process
        return
    # The workers look for Trivial here.
    os.environ.update(PYTHONPATH=f"{Path(__file__).parent}:{CHECKOUT}", RAY_AUTH_MODE="disabled",
                      RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    os.environ.pop("RAY_ADDRESS", None)
    import ray
    from ray.cluster_utils import Cluster

    from jobs.cluster.actor_pool import Pool
    from jobs.cluster.config import ClusterConfig
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False})
    for _ in range(workers):
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    os.environ["RAY_ADDRESS"] = cluster.address
    pool = Pool(ClusterConfig(workers=workers))
    try:
        yield pool
    finally:
        pool.close()
        ray.shutdown()
        cluster.shutdown()


def _pictures(work: Path, count: int) -> Path:
    """A folder of `count` names for the photographs."""
    folder = work / f"scale-pictures-{count}"
    if not folder.exists():
        hidden = folder.with_name(f".{folder.name}-{os.getpid()}")
        hidden.mkdir()
        made = photographs.make(work)
        for number in range(count):
            os.link(made[number % len(made)], hidden / f"{number:06d}.jpg")
        hidden.rename(folder)
    return folder


# The tables.


def measured(part: str, work: Path, **given: Any) -> dict[str, Any]:
    """What a part of this script says in a process of its own."""
    print(f"{part} {given} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, __file__, "--part", json.dumps([part, given]), "--work", str(work)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planning(work: Path, sizes: Sizes) -> list[dict[str, Any]]:
    long, few = (laion(work / f"laion-{count}.parquet", count) for count in (sizes.rows, sizes.few))
    table = laion(work / f"laion-{sizes.csv}.csv", sizes.csv)
    found = [measured("plan", work, source=str(source), rows=rows, where=where)
             for source, rows, where in ((few, sizes.few, ""), (few, sizes.few, WHERE), (long, sizes.rows, ""),
                                         (long, sizes.rows, WHERE), (table, sizes.csv, ""))]
    print("\n| list | rows | filter | file | items | seconds | peak memory | plan |\n|---|---|---|---|---|---|---|---|")
    for one, source in zip(found, (few, few, long, long, table), strict=True):
        print(f"| {source.suffix[1:]} | {one['rows']:,} | {one['where'] or 'none'} "
              f"| {source.stat().st_size / 1e6:,.1f} MB | {one['items']:,} | {one['seconds']:.2f} "
              f"| {one['peak_mb']:.0f} MB, {one['before_mb']:.0f} MB of it before "
              f"| {one['plan_bytes'] / 1e6:,.3f} MB |")
    return found


def driving(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    found = [measured("driver", work, items=items, workers=count) for items, count in (
        (sizes.trivial, 0), (4 * sizes.trivial, 0), *((sizes.trivial, count) for count in workers))]
    print("\n| trivial items | workers | items/s | driver CPU an item | driver memory grew by |\n|---|---|---|---|---|")
    for one in found:
        print(f"| {one['items']:,} | {one['workers'] or 'in process'} | {one['items'] / one['seconds']:,.0f} "
              f"| {one['driver_cpu'] / one['items'] * 1e3:.2f} ms | {one['driver_mb']:,.0f} MB |")
    print(f"\nAll on the {os.cpu_count()} cores of one machine: more workers than that share them. In process the "
          f"driver is the worker too.")
    return found


def working(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    found = [measured("shard", work, pictures=sizes.pictures, workers=count) for count in workers]
    print("\n| pictures | workers, each a node | pictures/s |\n|---|---|---|")
    for one in found:
        print(f"| {one['pictures']:,} | {one['workers']} | {one['pictures'] / one['seconds']:,.0f} |")
    return found


def listing(work: Path, sizes: Sizes) -> dict[str, Any]:
    found = {"lists": measured("lists", work, items=sizes.items),
             "resume": [measured("resume", work, items=sizes.recorded, how=how) for how in ("packs", "files")]}
    print(f"\n| of {found['lists']['items']:,} items | seconds | bytes | peak memory so far |\n|---|---|---|---|")
    for name, one in found["lists"].items():
        if name != "items":
            length = f"{one['bytes']:,}" if "bytes" in one else ""
            print(f"| {name} | {one['seconds']:.1f} | {length} | {one['peak_mb']:,.0f} MB |")
    print("\n| records there | from | seconds | memory |\n|---|---|---|---|")
    for one in found["resume"]:
        print(f"| {one['items']:,} | {one['from']} | {one['seconds']:.2f} | {one['mb']:.0f} MB |")
    return found


def extrapolated(found: dict[str, Any], sizes: Sizes) -> None:
    """What 100 million and 5 billion rows would cost, by the constants measured."""
    per_row = (found["plan"][2]["seconds"] - found["plan"][0]["seconds"]) / sizes.rows
    filtered = (found["plan"][3]["seconds"] - found["plan"][1]["seconds"]) / sizes.rows
    at_all, base = found["lists"]["lists"], found["plan"][0]["before_mb"]
    count = at_all["items"]
    each = {name: one["seconds"] / count for name, one in at_all.items() if name != "items"}
    busiest = max(one["driver_cpu"] / one["items"] for one in found["driver"][2:])
    packed = found["lists"]["resume"][0]
    print("\n| | 100 million rows | 5 billion rows |\n|---|---|---|")
    totals = [rows // ROWS_PER_SHARD for rows in (100_000_000, 5_000_000_000)]
    lines = {
        "items": [f"{n:,}" for n in totals],
        "plan, bytes": [f"{n * at_all['plan']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "manifest, bytes": [f"{n * at_all['manifest']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "reading the list, no filter": [_time(n * ROWS_PER_SHARD * per_row) for n in totals],
        "reading the list, with a filter": [_time(n * ROWS_PER_SHARD * filtered) for n in totals],
        "driver CPU for the items": [_time(n * busiest) for n in totals],
        "driver memory, at the most": [f"{base + n * (at_all['going on']['peak_mb'] - base) / count:,.0f} MB"
                                       for n in totals],
        "manifest, written and loaded": [_time(n * (each["manifest"] + each["manifest, loaded"])) for n in totals],
        "going on, from packs on a disk": [_time(n * (each["going on"] + packed["seconds"] / packed["items"]))
                                           for n in totals],
        "requests to list the records on S3": [f"{-(-n // LISTED):,}" for n in totals],
        "requests to read packs when going on": [f"{-(-n // 5000):,}" for n in totals],
    }
    for name, cells in lines.items():
        print(f"| {name} | {' | '.join(cells)} |")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--only", nargs="+", choices=["plan", "driver", "workers", "lists"],
                        default=["plan", "driver", "workers", "lists"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--small", action="store_true", help="a hundredth of everything")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = photographs.work_folder(given.work)
    if given.part:
        name, settings = json.loads(given.part)
        part = {"plan": plan, "driver": driver, "shard": shard, "lists": lists, "resume": resume}[name]
        print(json.dumps(part(work, **settings)))
        return 0
    sizes = Sizes().small() if given.small else Sizes()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    makers = {"plan": lambda: planning(work, sizes), "driver": lambda: driving(work, sizes, given.workers),
              "workers": lambda: working(work, sizes, given.workers), "lists": lambda: listing(work, sizes)}
    found = {name: makers[name]() for name in given.only}
    if {"plan", "driver", "lists"} <= found.keys():
        extrapolated(found, sizes)
    (work / "scale.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
