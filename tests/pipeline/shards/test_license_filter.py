"""`--licenses` takes rows by the license that their source states, whatever kind of source it is."""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.media import tars
from pipeline.shards.adopt import Adopt
from pipeline.shards.shard import Shard, count_rows
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.pipeline import synthetic

ROWS: list[dict[str, Any]] = [
    {"License": "https://creativecommons.org/publicdomain/zero/1.0/"}, {"License": "CC BY-NC 4.0"},
    {"License": "CC BY 2.0"}, {"License": ""}, {"License": "all rights reserved"}, {"License": "CC-BY-4.0"},
    {"License": "CC BY-SA 4.0"}]
ALLOWED = [0, 2, 5]


def images() -> list[bytes]:
    streams = [io.BytesIO() for _ in ROWS]
    for number, stream in enumerate(streams):
        synthetic.noise(32, 32, number).save(stream, "PNG")
    return [stream.getvalue() for stream in streams]


def folder_with_table(folder: Path) -> Path:
    for number, data in enumerate(images()):
        (folder / f"{number}.png").write_bytes(data)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "License"])
        writer.writerows([f"{number}.png", f"number {number}", row["License"]] for number, row in enumerate(ROWS))
    return folder


def folder_with_documents(folder: Path) -> Path:
    for number, (data, row) in enumerate(zip(images(), ROWS, strict=True)):
        (folder / f"{number}.png").write_bytes(data)
        (folder / f"{number}.json").write_text(json.dumps(row | {"caption": f"number {number}"}))
    return folder


def table(folder: Path) -> Path:
    columns = {"image": images(), "caption": [f"number {number}" for number in range(len(ROWS))],
               "License": [row["License"] for row in ROWS]}
    pq.write_table(pa.table(columns), folder / "images.parquet")
    return folder / "images.parquet"


def tar(folder: Path) -> Path:
    with tars.TarWriter(folder / "images.tar") as writer:
        for number, (data, row) in enumerate(zip(images(), ROWS, strict=True)):
            writer.add({"__key__": str(number), "png": data, "json": json.dumps(row).encode(),
                        "txt": f"number {number}".encode()})
    return folder / "images.tar"


def shard(tmp_path: Path, source: Path, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    dataset = Dataset.parse(str(tmp_path / "root"), "art")
    manifest = run_stage(Shard(dataset, ShardConfig(source=(str(source),), image_size=32, format="png",
                                                    samples_per_shard=3, **settings)))
    return manifest, [row for record in manifest["items"] for row in metadata(dataset, record)]


@pytest.mark.parametrize("make", [folder_with_table, folder_with_documents, table, tar])
def test_rows_of_other_licenses_are_filtered_and_counted(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "source").mkdir()
    manifest, rows = shard(tmp_path, make(tmp_path / "source"), licenses="CC0-1.0,CC-BY-*")
    assert [row["caption"] for row in rows] == [f"number {number}" for number in ALLOWED]
    assert [row["License"] for row in rows] == [ROWS[number]["License"] for number in ALLOWED]
    info = manifest["info"]
    counts = [info[name] for name in ("rows", "filtered", "filtered_by_license", "filtered_without_license")]
    assert counts == [7, 4, 2, 2]
    assert count_rows(manifest, rows) == {"rows": 7, "good": 3, "failed": 0, "filtered": 4}
    assert not manifest["totals"]["skipped"] and manifest["section"]["licenses"] == "CC0-1.0,CC-BY-*"


@pytest.mark.parametrize("kind", ["list", "captions"])
def test_unreadable_rows_are_counted_as_unreadable(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").write_bytes(images()[0])
    lines = {"list": [f'"data:image/png;base64,{base64.b64encode(images()[0]).decode()}",a,CC0', "http://h/1.png,b"],
             "captions": ["a.png,a,CC0", "b.png,b"]}[kind]
    text = "\n".join([f"{'url' if kind == 'list' else 'file'},caption,License", *lines, ""])
    name = "list.csv" if kind == "list" else "captions.csv"
    (folder / name).write_text(text)
    manifest, rows = shard(tmp_path, folder / name if kind == "list" else folder, licenses="CC0-1.0")
    assert manifest["totals"]["skipped"] == {"bad_row": 1} and "filtered" not in manifest["info"]
    assert [row["caption"] for row in rows] == ["a"]


def test_without_the_setting_folders_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    manifest, rows = shard(tmp_path, table(tmp_path / "source"))
    assert len(rows) == 7 and "licenses" not in manifest["section"]


def test_a_source_without_the_licenses_is_refused_with_the_counts(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(StageFailed, match=r"used: 5 filtered_by_license, 2 filtered_without_license\n.*credits"):
        shard(tmp_path, table(tmp_path / "source"), licenses="MIT")


def test_adopted_tars_are_not_filtered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes tars as they are, and not licenses"):
        Adopt(Dataset.parse(str(tmp_path), "art"), ShardConfig(source=("tars",), licenses="MIT"))


@pytest.mark.parametrize("pattern", ["CC-BY", "free", "CC0-1.0,unknown"])
def test_a_pattern_without_a_license_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"shard\.licenses has .*: no SPDX identifier matches it"):
        ShardConfig(licenses=pattern)
