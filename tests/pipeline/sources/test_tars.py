"""Tars as sources: filtered, resized, damaged and hostile ones."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from pipeline.shards.adopt import Adopt
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, shard_source, stored_samples


def write_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], ended: bool = True) -> Path:
    """A tar of these members, which may be anything that a tar can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def member(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def sample(key: str, number: int, **meta) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PICTURES[f"{number:02d}.png"]), (f"{key}.txt", f"caption {number}".encode()),
            (f"{key}.json", json.dumps({"score": number} | meta).encode())]


def flatten(*samples: list) -> list:
    return [member for members in samples for member in members]


def test_tars_are_filtered_and_resized_again(tmp_path, s3):
    tar_contents = [flatten(*(sample(f"{tar}/{number:04d}", number, caption=f"caption {number}", url=f"http://e/{number}")
                              for number in range(tar * 10, tar * 10 + 10))) for tar in range(3)]
    for number, members in enumerate(tar_contents):
        write_tar(tmp_path / "tars" / f"{number:05d}.tar", members)
        (tmp_path / "tars" / f"{number:05d}_stats.json").write_text("{}")
        storage.put_bytes((tmp_path / "tars" / f"{number:05d}.tar").read_bytes(), f"{s3}/tars/{number:05d}.tar")
    where = 'score >= 5 and score != 15 and contains(caption, "caption") and url != "http://e/16"'
    expected = [number for number in range(5, 30) if number not in {15, 16}]
    results = []
    for root, source in (("folder", tmp_path / "tars"), ("pattern", tmp_path / "tars" / "*"), ("s3", f"{s3}/tars")):
        dataset, manifest = shard_source(tmp_path / root, source, where=where, image_size=8)
        rows = table(dataset, manifest)
        assert [row["score"] for row in rows] == expected
        assert [row["source_key"] for row in rows] == [f"{number // 10}/{number:04d}" for number in expected]
        assert [row["source_row"] for row in rows] == [number // 10 * 10**9 + number % 10 for number in expected]
        assert {(row["width"], row["original_height"]) for row in rows} == {(8, 24)}
        assert manifest["info"]["filtered"] == 7
        assert [record["info"].get("filtered") for record in manifest["items"]] == [5, 2, None]
        results.append(stored_samples(dataset, manifest))
    assert results[0] == results[1] == results[2]
    with pytest.raises(StageFailed, match="can be used: 30 filtered"):
        shard_source(tmp_path / "nothing", tmp_path / "tars", where="score > 100")


def test_the_complete_samples_of_a_cut_tar_are_read(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", flatten(*(sample(f"{number}", number) for number in range(4))))
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        places = {info.name: (info.offset, info.offset_data, info.size) for info in tar}
    cuts = {"in the picture": (places["3.png"][1] + 100, 3), "in the metadata": (places["3.json"][1] + 3, 3),
            "in a header": (places["3.png"][0] + 100, 3), "before a sample": (places["3.png"][0], 3),
            "in a sample": (places["3.json"][0], 3), "before the end": (places["3.json"][1] + 512, 4),
            "in the first": (places["0.png"][1] + 1, 0), "nothing": (0, 0)}
    for name, (length, _) in cuts.items():
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / f"{name}.tar").write_bytes(data[:length])
    damaged = bytearray(data)
    damaged[places["2.png"][0]:places["2.png"][0] + 200] = b"\xff" * 200
    (tmp_path / "cut" / "zz damaged.tar").write_bytes(damaged)
    dataset, manifest = shard_source(tmp_path, tmp_path / "cut")
    names = sorted([*cuts, "zz damaged"])
    assert {name: record["samples"] for name, record in zip(names, manifest["items"], strict=True)} == {
        name: expected for name, (_, expected) in cuts.items()} | {"zz damaged": 3}
    assert manifest["totals"]["skipped"] == {"tar_cut": len(names)} and manifest["totals"]["noted"] == {}
    assert {line["key"] for line in ledger(dataset, manifest)} == {f"{name}.tar" for name in names}
    assert all(sample["txt"] and sample["json"]["score"] is not None for sample in stored_samples(dataset, manifest))


def test_members_outside_samples_are_counted_and_the_rest_is_read(tmp_path):
    holes = member(tarfile.GNUTYPE_SPARSE)
    unsafe = {"../outside.png": PICTURES["00.png"], "/absolute.png": PICTURES["00.png"],
              "below/../../outside.png": PICTURES["00.png"], "link.png": member(tarfile.SYMTYPE, "/etc/passwd"),
              "hard.png": member(tarfile.LNKTYPE, "0.png"), "device.png": member(tarfile.CHRTYPE),
              "pipe.png": member(tarfile.FIFOTYPE), "holes.png": holes}
    members = [*sample("0", 0), *unsafe.items(), *sample("below/1", 1), ("folder", member(tarfile.DIRTYPE)),
               ("README", b"no ending"), ("__meta__/x.json", b"{}"), ("below/._2.png", b"of a Mac"),
               ("._2.png", b"of a Mac"), *sample("below/2", 2), ("below/2.png", PICTURES["05.png"]),
               ("3.txt", b"no picture"), ("3.json", b"{}"), ("4.webp", PICTURES["04.png"]), ("4.PNG", b"second"),
               ("5.JPG", PICTURES["05.png"]), ("5.cls", b"7"), ("6.png", b"no picture"), ("7.png", PICTURES["07.png"]),
               ("7.json", b"[" * 100_000), ("8.png", PICTURES["08.png"]), ("8.json", b'{"text": "x", "exif": 1e999}')]
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    dataset, manifest = shard_source(tmp_path, tmp_path / "tars", image_size=32)
    rows = table(dataset, manifest)
    assert [row["source_key"] for row in rows] == ["0", "below/1", "below/2", "below/2", *"345678"]
    assert {row["source_key"]: row["error_message"].split(":")[0] for row in rows if row["error_message"]} == {
        "3": "picture_missing", "6": "not_a_picture"}
    assert [row["caption"] for row in rows] == [*(f"caption {number}" for number in range(3)), "", "no picture", "", "",
                                               "", "", "x"]
    remarks = {(line["key"], line["reason"]) for line in ledger(dataset, manifest) if line["kept"]}
    assert remarks == {(name, "unsafe_member") for name in unsafe} | {
        ("below/._2.png", "hidden_member"), ("a.tar", "other_images"),
        *((name, "ignored_member") for name in ("README", "__meta__/x.json", "._2.png")),
        ("below/2", "caption_missing"), ("7", "json_unreadable"), ("8", "cell_changed")} | {
            (key, "caption_missing") for key in "4567"}
    assert manifest["totals"]["skipped"] == {"picture_missing": 1, "not_a_picture": 1}
    assert not (tmp_path / "outside.png").exists()
    assert path.exists()


def test_headers_with_false_sizes_use_no_memory(tmp_path):
    data = write_tar(tmp_path / "good.tar", sample("0", 0) + sample("1", 1)).read_bytes()
    with tarfile.open(tmp_path / "good.tar") as tar:
        place = next(info.offset for info in tar if info.name == "1.png")
    for name, size in (("huge", 1 << 60), ("negative", -512), ("large", 8**11 - 1)):
        info = tarfile.TarInfo("1.png")
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / f"{name}.tar").write_bytes(data[:place] + header + data[place + 512:])
        faults = TarFaults()
        tracemalloc.start()
        assert [sample["__key__"] for sample in read_foreign_tar(tmp_path / f"{name}.tar", faults)] == ["0"], name
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert faults.cut and peak < 1 << 20
    (tmp_path / "none.tar").write_bytes(b"\xff" * 5000)
    assert list(read_foreign_tar(tmp_path / "none.tar", faults := TarFaults())) == [] and faults.cut


def test_types_come_from_the_parquet_beside_or_the_first_samples(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "plain" / f"{number}.tar", sample("0", number, label=None if number else 5))
        write_tar(tmp_path / "beside" / f"{number}.tar", sample("0", number, label=5 if number else None))
        pq.write_table(pa.table({"label": pa.array([5 if number else None], pa.int32()), "score": [1]}),
                       tmp_path / "beside" / f"{number}.parquet")
    for name in ("plain", "beside"):
        dataset, manifest = shard_source(tmp_path / f"root-{name}", tmp_path / name, kind="tars")
        schemas = [pq.read_schema(dataset.fetch("shards", file)) for record in manifest["items"]
                   for file in record["files"] if file["name"].endswith(".parquet")]
        assert schemas[0] == schemas[1] and schemas[0].field("label").type == pa.int64()


@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize(("cells", "kind", "stored"), [
    (([1], ["text"]), pa.string(), ["1", "text"]), (([None], [7]), pa.int64(), [None, 7]),
    (([1], [0.5]), pa.float64(), [1.0, 0.5]), (([True], [1]), pa.string(), ["true", "1"]),
    (([2**60 + 1], [None], [1.5]), pa.string(), ["1152921504606846977", None, "1.5"])])
def test_a_column_has_one_type_that_suits_all_tars(adopt, cells, kind, stored, tmp_path):
    for number, column in enumerate(cells):
        write_tar(tmp_path / "in" / f"{number}.tar", flatten(*(
            sample(f"{row}", number, a=cell) for row, cell in enumerate(column))))
    if adopt:
        dataset = Dataset.parse(str(tmp_path / "root"), "x")
        manifest = run_stage(Adopt(dataset, ShardConfig(source=str(tmp_path / "in"))))
    else:
        dataset, manifest = shard_source(tmp_path / "root", tmp_path / "in")
    tables = [pq.read_table(dataset.fetch("shards", file)) for record in manifest["items"]
              for file in record["files"] if file["name"].endswith(".parquet")]
    assert {table.schema.field("a").type for table in tables} == {kind}
    assert [cell for table in tables for cell in table["a"].to_pylist()] == stored
    assert not ledger(dataset, manifest)


def test_a_shard_with_another_type_is_named(tmp_path):
    late = flatten(*(sample(f"{number}", number % 8, a=1 if number < 64 else "text") for number in range(65)))
    write_tar(tmp_path / "in" / "0.tar", sample("0", 0, a=1))
    write_tar(tmp_path / "in" / "1.tar", late)
    dataset, manifest = shard_source(tmp_path / "root", tmp_path / "in")
    assert [row["a"] for row in table(dataset, manifest)] == [1, *["1"] * 64, "text"]
    assert [(line["key"], line["detail"], line["kept"]) for line in ledger(dataset, manifest)
            if line["reason"] == "column_type"] == [("000001.tar", "a: string in this shard, int64 in others", True)]
