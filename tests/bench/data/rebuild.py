"""Seconds and memory that the driver of a rebuild needs before work starts, for many rows of which few changed.

    python tests/bench/data/rebuild.py [ROWS] [FOLDER]

Makes a version of a list of URLs with its listing and metadata. Then plans the next version in a new process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for a checkout that was not installed

from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import Item, Output
from pipeline.takedowns.takedown_list import Forgotten
from pipeline.versions.listing import LISTING, LISTING_SCHEMA, read_listing, wide, write_listing
from pipeline.versions.source_diff import Hashes, SourceDiff
from pipeline.versions.update_shards import Update

_SHARD_ROWS = 1000
_CHANGED = 1000  # one row in this number changed


def write_source(path: Path, rows: int, night: int) -> ShardConfig:
    """The list of URLs of one night."""
    with path.open("w") as file:
        for number in range(rows):
            caption = f"an image of subject {number % 977}" + (f", night {night}" if number % _CHANGED == night else "")
            file.write(json.dumps({"url": f"https://images.example.org/{number // 1000:05d}/{number:08d}.jpg",
                                   "caption": caption}) + "\n")
    return ShardConfig(source=(str(path),))


class Made(Shard):
    """A version without images: its metadata and its listing."""

    def __init__(self, dataset: Dataset, config: ShardConfig, diff: SourceDiff) -> None:
        super().__init__(dataset, config)
        self.listing = diff.listing()

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {}

    def plan(self) -> Iterator[Item]:
        for first in range(0, self.listing.num_rows, _SHARD_ROWS):
            yield Item(f"{first // _SHARD_ROWS:06d}", {"first": first})

    def process(self, item: Item, scratch: Path) -> Output:
        names = self.listing["name"].slice(item.inputs["first"], _SHARD_ROWS).to_pylist()
        numbers = range(item.inputs["first"], item.inputs["first"] + len(names))
        texts = {"key": [f"{number:010d}" for number in numbers], "url": names, "caption": ["a caption"] * len(names),
                 "status": ["success"] * len(names), **{name: [f"{number:064x}" for number in numbers]
                                                        for name in ("sha256", "original_sha256")}}
        pq.write_table(pa.table(texts | {"source_row": pa.array(numbers, pa.int64())}), scratch / "parquet")
        (scratch / "tar").write_bytes(b"")
        return Output(len(names), {f"{item.id}.{kind}": scratch / kind for kind in ("tar", "parquet")},
                      info={"rows": len(names)})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        numbers = np.arange(self.listing.num_rows)
        table = self.listing.select(["name", "mark", "stamp"]).to_pydict() | {
            "sha256": [f"{number:064x}" for number in numbers], "row": numbers,
            "shard": [f"{number // _SHARD_ROWS:06d}" for number in numbers], "status": ["success"] * len(numbers)}
        write_listing(pa.table(table).select(LISTING_SCHEMA.names).cast(wide(LISTING_SCHEMA)), scratch / LISTING)
        return Output(files={LISTING: scratch / LISTING})


def make(folder: Path, rows: int) -> None:
    config = write_source(folder / "list.jsonl", rows, 0)
    with tempfile.TemporaryDirectory() as scratch:
        run_stage(Made(Dataset(str(folder / "root"), "many"), config, SourceDiff.read(config, Forgotten(), scratch)))
    write_source(folder / "list.jsonl", rows + 100, 1)


def plan(folder: Path) -> None:
    """Plan the next version; print seconds and memory."""
    def memory() -> float:  # of this process alone; after a fork `resource` counts the parent too
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    config, before_all = ShardConfig(source=(str(folder / "list.jsonl"),)), memory()
    last, start = Dataset(str(folder / "root"), "many"), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        source = SourceDiff.read(config, Forgotten(), scratch)
        read = time.monotonic()
        diff = source.against(read_listing(last), Hashes.none())
        joined = time.monotonic()
        items = sum(1 for _ in Update(Dataset(last.root, "many", "v2"), config, last, diff, 0.25).plan())
    print(json.dumps({"read_source_s": round(read - start, 2), "compare_s": round(joined - read, 2),
                      "plan_s": round(time.monotonic() - joined, 2), "items": items, "counts": dict(diff.counts),
                      "start_mb": round(before_all), "peak_mb": round(memory())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=300_000, metavar="ROWS")
    parser.add_argument("folder", nargs="?", default="", metavar="FOLDER",
                        help="with a version that an earlier call made: only plan; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "list.jsonl").exists():
            plan(folder)
        else:
            make(folder, args.rows)
            subprocess.run([sys.executable, __file__, str(args.rows), str(folder)], check=True)


if __name__ == "__main__":
    main()
