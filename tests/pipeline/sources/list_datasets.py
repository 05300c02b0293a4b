"""Small lists of image URLs, and datasets sharded from them."""

import bz2
import csv
import gzip
import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.downloads.config import DownloadConfig
from pipeline.media import tars
from pipeline.rows.rows import ReadReport
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from pipeline.stages.driver import run_stage
from pipeline.versions import verify
from tests.pipeline.synthetic import encoded, noise

COUNT = 30
DOWNLOAD = DownloadConfig(retries=0, connections=8, timeout=10.0, read_timeout=5.0, allow_hosts=("127.0.0.1",))
PICTURES = {f"{number:02d}.png": encoded(noise(20, 24, number), "PNG") for number in range(COUNT)}


def shard_source(root, source, **options) -> tuple[Dataset, dict]:
    """Shard a source into the dataset `x` of small shards. The dataset without faults, and its manifest."""
    dataset = Dataset.parse(str(root), "x")
    settings = {"samples_per_shard": 7, "image_size": 16, "download": DOWNLOAD, "format": "png"} | options
    source = tuple(map(str, source)) if isinstance(source, tuple | list) else str(source)
    manifest = run_stage(Shard(dataset, ShardConfig(source=source, **settings)))
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    return dataset, manifest


def stored_samples(dataset: Dataset, manifest: dict) -> list[dict]:
    """The samples of all tars, their JSON read."""
    return [{key: json.loads(value) if key == "json" else value for key, value in sample.items() if key != "__url__"}
            for record in manifest["items"]
            for sample in tars.read(dataset.fetch("shards", {file["name"][-4:]: file for file in record["files"]}[
                ".tar"]))]


def laion(image_site: str) -> list[dict]:
    """Rows with the columns of LAION, and with its missing values."""
    return [{"URL": f"http://{image_site}/{number:02d}.png",
             "TEXT": f'image "{number}",\nof noise' if number % 5 else None,
             "WIDTH": 20, "HEIGHT": 24 if number % 4 else None, "similarity": number / 64,
             "punsafe": None if number == 3 else (number % 10) / 16, "pwatermark": 0.5,
             "hash": number * 2**50 - 2**54} for number in range(COUNT)]


def write_list(path: Path, rows: list[dict], **options) -> Path:
    """Write rows to a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, _, packing = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path
    lines = io.StringIO(newline="")
    if kind == "jsonl":
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "tsv":  # TSV has no quotes, so a cell has no tabs or line breaks
        lines.writelines("\t".join("" if cell is None else " ".join(str(cell).split()) for cell in cells) + "\n"
                         for cells in [list(rows[0]), *(row.values() for row in rows)])
    else:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = lines.getvalue().encode()
    if packing == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({"": bytes, "gz": gzip.compress, "bz2": bz2.compress}[packing](data))
    return path


def open_path(*paths, **options):
    return open_source(ShardConfig(source=tuple(map(str, paths)), **options))


def read_back(source, folder: Path) -> tuple[list[list[int]], list[int], list[int]]:
    """(source rows of each part, rows that each part says it has, rows left out of each), as a worker reads them."""
    rows, counts, filtered = [], [], []
    parts = []
    for part in source.parts():
        for name, data in part.carries:
            storage.put_bytes(data, storage.join(str(folder), name))
        parts.append(part)
    there = pickle.loads(pickle.dumps(source))
    for part in parts:
        reading = ReadReport()
        rows.append([row.number for row in there.rows(str(folder), part.inputs, folder, reading)])
        counts.append(part.inputs["count"])
        filtered.append(part.inputs["filtered"] + reading.filtered)
    return rows, counts, filtered
