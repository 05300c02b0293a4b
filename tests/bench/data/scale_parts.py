"""The measurements of scale.py, and the list that they read. scale.py runs each in its own process."""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
_GROUP = 100_000


def write_laion_list(path: Path, count: int) -> Path:
    """A parquet (or CSV) list of `count` rows with the columns and about the sizes of LAION's."""
    if path.exists():
        return path
    hidden = path.with_name(f".{path.name}")
    rng, writer = np.random.default_rng(count), None
    for first in range(0, count, _GROUP):
        table = _laion_rows(rng, first, min(_GROUP, count - first))
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


def plan(work: Path, source: str, rows: int, where: str) -> dict[str, Any]:
    """Claim a folder for a list: identity, parts, plan.json."""
    with _folder(work) as root:
        config = ShardConfig(source=source, samples_per_shard=ROWS_PER_SHARD, image_size=256, where=where)
        stage = Shard(Dataset.parse(str(root), "x"), config)
        begun, before = time.perf_counter(), memory()["VmRSS"]
        items = prepare(stage)
        plan_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        return {"rows": rows, "where": where, "items": len(items), "seconds": time.perf_counter() - begun,
                "peak_mb": memory()["VmHWM"], "before_mb": before, "plan_bytes": plan_bytes}


class Trivial(Stage):
    """Items without work: the run costs only what the driver adds for each item."""

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
    """Trivial items, in process (0 workers) or on `workers` nodes of one worker each."""
    with _folder(work) as root, _pool(workers) as runner:
        run_stage(Trivial(str(root), 20 * max(workers, 1)), runner)  # the workers are up
        before, cpu, begun = memory()["VmRSS"], time.process_time(), time.perf_counter()
        run_stage(Trivial(str(root), items), runner, watch=lambda tally: None)
        return {"workers": workers, "items": items, "seconds": time.perf_counter() - begun,
                "driver_cpu": time.process_time() - cpu, "driver_mb": memory()["VmRSS"] - before}


def shard(work: Path, pictures: int, workers: int) -> dict[str, Any]:
    """Pack images of a folder into tars, on `workers` nodes with one worker each."""
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
    """Write and load the plan, records and manifest of `items` items, then resume the stage."""
    figures: dict[str, Any] = {"items": items}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        figures[name] = {"seconds": time.perf_counter() - begun, "peak_mb": memory()["VmHWM"]}

    with _folder(work) as root:
        stage = Trivial(str(root), items)
        with timed("plan"):
            planned_items = prepare(stage)
        with timed("plan, loaded"):
            planned_items = prepare(stage)
            ids = item_ids(planned_items)
        fingerprint = storage.read_json(f"{stage.folder}/plan.json")["fingerprint"]
        with timed("records, collected and packed"):
            packs = storage.join(stage.folder, "packs", fingerprint[:12])
            collected = records.Collected(lambda packed: _pack(packs, packed))
            for item_id in ids:
                collected.add(_record(item_id, fingerprint))
        with timed("records, in order"):
            ordered_records = collected.in_order(ids)
        with timed("manifest"):
            seal_stage(stage, planned_items, ordered_records)
        del ordered_records, collected, planned_items
        with timed("manifest, loaded"):
            manifest = read_manifest(stage.folder, "")
        with timed("content and totals"):
            assert records.content(manifest["fingerprint"], manifest["files"], manifest["items"]) == manifest["content"]
            assert records.totals(manifest["items"]) == manifest["totals"]
        with timed("every record, looked at"):
            assert sum(record["info"]["rows"] for record in manifest["items"]) == items * ROWS_PER_SHARD
        del manifest
        storage.remove(f"{stage.folder}/manifest.json")
        with timed("resume"):
            run_stage(stage, lambda stage, remaining_items: iter(()))
        for name, pattern in (("plan", "items-*.parquet"), ("manifest", "manifest-*.parquet"),
                              ("records, collected and packed", "packs/*/*")):
            figures[name]["bytes"] = sum(path.stat().st_size for path in Path(stage.folder).glob(pattern))
    return figures


def resume(work: Path, items: int, how: str) -> dict[str, Any]:
    """Load the records of many items, from packs or from one file each."""
    with _folder(work) as root:
        stage = Trivial(str(root), items)
        ids = item_ids(prepare(stage))
        fingerprint = storage.read_json(f"{stage.folder}/plan.json")["fingerprint"]
        packs = storage.join(stage.folder, "packs", fingerprint[:12])
        collected = records.Collected(lambda packed: _pack(packs, packed) if how == "packs" else None)
        folder = Path(stage.folder) / "records"
        folder.mkdir(exist_ok=True)
        for item_id in ids:
            record = _record(item_id, fingerprint)
            (folder / f"{item_id}.json").write_bytes(storage.json_bytes(record))
            collected.add(record)
        del collected
        begun, before = time.perf_counter(), memory()["VmRSS"]
        collection = read_records(stage, ids)
        seconds = time.perf_counter() - begun
        assert len(collection.ids) == items
        return {"items": items, "from": how, "seconds": seconds, "mb": memory()["VmRSS"] - before}


def _item(number: int) -> Item:
    """An item of a list in parquet."""
    first = number * ROWS_PER_SHARD
    return Item(f"{number:06d}", {"spans": [["s3://bucket/laion/part-00000-5114fd87-297e-42b0-9d11.snappy.parquet",
                                             first, first, first + ROWS_PER_SHARD]],
                                  "count": ROWS_PER_SHARD, "filtered": 0})


def _record(item: str, fingerprint: str) -> dict[str, Any]:
    """A record of a shard of a list: three files, some reasons."""
    number = int(item)
    return {"id": item, "plan": fingerprint, "samples": 8000 + number % 1000, "info": {"rows": ROWS_PER_SHARD},
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
        photos = photographs.make(work)
        for number in range(count):
            os.link(photos[number % len(photos)], hidden / f"{number:06d}.jpg")
        hidden.rename(folder)
    return folder


PARTS = {"plan": plan, "driver": driver, "shard": shard, "lists": lists, "resume": resume}
