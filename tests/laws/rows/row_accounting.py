"""Sharded sources, and a check that each of their rows is a sample or in the ledger."""

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.downloads.config import DownloadConfig
from pipeline.media import tars
from pipeline.shards import shard
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.versions import verify
from tests.pipeline.shards.test_shard import table
from tests.pipeline.synthetic import encoded, noise

PICTURES = {f"{number:02d}.png": encoded(noise(20, 24, number), "PNG") for number in range(24)}
FILES = PICTURES | {"text.jpg": b"no picture", "small.png": encoded(noise(4, 4), "PNG"), "empty.png": b"",
                    "cut.jpg": encoded(noise(64, 64), "JPEG")[:2000], "long.png": encoded(noise(300, 2), "PNG")}
IMG2DATASET = {"count", "successes", "failed_to_download", "failed_to_resize", "duration", "start_time", "end_time",
               "status_dict"}


def config(source, **options) -> ShardConfig:
    download = DownloadConfig(**{"retries": 0, "connections": 8, "timeout": 10.0, "read_timeout": 5.0,
                                 "allow_hosts": ("127.0.0.1",)} | options.pop("download", {}))
    return ShardConfig(**{"source": str(source), "samples_per_shard": 7, "image_size": 16, "format": "png",
                          "download": download} | options)


def shard_source(root, source, **options) -> tuple[Dataset, dict]:
    dataset = Dataset.parse(str(root), "x")
    return dataset, run_stage(Shard(dataset, config(source, **options)))


def write_list(path: Path, rows: list[dict]) -> Path:
    """Rows as parquet, CSV or lines of JSON."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_url_list(path: Path, addresses: list[str]) -> Path:
    return write_list(path, [{"url": url, "caption": f"row {row}"} for row, url in enumerate(addresses)])


def check_accounting(dataset: Dataset, manifest: dict, rows: int) -> dict[int, str]:
    """Check that tars, parquet, ledger, statistics and records tell the same story; reasons by row, "" for good."""
    reasons: dict[int, str] = {}
    filtered, schemas = 0, set()
    for record in manifest["items"]:
        parquet = dataset.fetch("shards", file_of(record, ".parquet"))
        schemas.add(pq.read_schema(parquet))
        lines = pq.read_table(parquet).to_pylist()
        samples = list(tars.read(dataset.fetch("shards", file_of(record, ".tar"))))
        good = [line for line in lines if line["status"] == "success"]
        assert [sample["__key__"] for sample in samples] == [line["key"] for line in good]
        assert len({line["key"] for line in lines}) == len(lines)
        assert len({line["source_row"] for line in lines}) == len(lines) == record["info"]["rows"]
        for line in lines:
            if line["status"] == "success":
                assert line["error_message"] is None and line["sha256"] and line["original_sha256"]
            else:
                assert line["status"] in {"failed_to_download", "failed_to_resize", "duplicate"}
                assert line["sha256"] is None or line["status"] == "duplicate"
            reasons[line["source_row"]] = (line["error_message"] or "").split(":")[0]
        counted = Counter(reasons[line["source_row"]] for line in lines)
        assert record["samples"] == counted.pop("", 0) and record["skipped"] == dict(counted)
        stats = storage.read_json(storage.join(dataset.folder("shards"), f"{record['id']}_stats.json"))
        by_status = Counter(line["status"] for line in lines)
        assert stats.keys() == IMG2DATASET and stats["count"] == len(lines) and stats["successes"] == len(samples)
        assert stats["start_time"] <= stats["end_time"] and stats["duration"] >= 0
        assert [stats[name] for name in ("failed_to_download", "failed_to_resize")] == [
            by_status["failed_to_download"], by_status["failed_to_resize"]]
        assert Counter(stats["status_dict"]) == Counter({"success": len(samples)} if samples else {}) + counted
        filtered += record["info"].get("filtered", 0)
    assert len(reasons) + filtered == rows and set(reasons) <= set(range(rows)) and len(schemas) == 1
    row_counts = shard.count_rows(manifest, table(dataset, manifest))
    assert row_counts == {"rows": rows, "good": sum(not reason for reason in reasons.values()), "filtered": filtered,
                          "failed": sum(map(bool, reasons.values()))}
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    return reasons


def stored_images(dataset: Dataset, manifest: dict) -> list[bytes]:
    return [tars.sample_image(sample) for record in manifest["items"]
            for sample in tars.read(dataset.fetch("shards", file_of(record, ".tar")))]
