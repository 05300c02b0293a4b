import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.media import tars
from pipeline.shards.adopt import Adopt
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline import synthetic
from tests.pipeline.shards.test_shard import ledger
from tests.pipeline.synthetic import encoded, noise

COLUMNS = {"url": pa.string(), "caption": pa.string(), "key": pa.string(), "status": pa.string(),
           "error_message": pa.string(), "width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(),
           "original_height": pa.int32(), "exif": pa.string(), "sha256": pa.string(), "similarity": pa.float64(),
           "label": pa.int64()}


def write_download(folder: Path, shards: int = 2, rows: int = 8) -> Path:
    """A folder as img2dataset leaves it: every fourth row failed."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        lines, good = [], 0
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(rows):
                key, number = f"{shard:05d}{row:04d}", shard * rows + row
                line = dict.fromkeys(COLUMNS) | {
                    "url": f"http://user:hidden-word@example.org/{number}.jpg", "caption": f"picture {number}",
                    "key": key, "similarity": number / 4, "label": number if shard else None}
                if row % 4 == 3:
                    lines.append(line | {"status": "failed_to_download", "error_message":
                                         f"<urlopen error of http://user:hidden-word@example.org/{number}.jpg>"})
                    continue
                size = 32 + number
                data = encoded(Image.fromarray(np.asarray(noise(size, 40, number)) // 2), "JPEG")
                line |= {"status": "success", "width": size, "height": 40, "original_width": 2 * size,
                         "original_height": 80, "exif": "{}", "sha256": f"{number:064x}"}
                lines.append(line)
                good += 1
                for suffix, content in (("jpg", data), ("txt", line["caption"].encode()),
                                        ("json", json.dumps(line).encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        pq.write_table(pa.Table.from_pylist(lines, pa.schema(COLUMNS.items())), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": rows, "successes": good}))
    return folder


def adopt_source(root, source, name="old") -> tuple[Dataset, dict]:
    dataset = Dataset.parse(str(root), name)
    return dataset, run_stage(Adopt(dataset, ShardConfig(source=str(source))))


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_a_folder_of_img2dataset_is_sealed_in_place(tmp_path):
    source = write_download(tmp_path / "source", shards=3)
    before = state(source)
    dataset, manifest = adopt_source(tmp_path / "root", source)
    assert state(source) == before
    assert not list((tmp_path / "root").rglob("*.tar"))
    assert sum(len(data) for data in synthetic.files_below(tmp_path / "root").values()) < 60_000
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    assert manifest["totals"]["samples"] == 18 and manifest["totals"]["skipped"] == {"failed_to_download": 6}
    numbers, schemas, seen = [number for number in range(24) if number % 4 != 3], set(), []
    for shard, record in enumerate(manifest["items"]):
        tar = dataset.fetch("shards", file_of(record, ".tar"), check=True)
        assert tar == source / f"{shard:05d}.tar"
        parquet = dataset.fetch("shards", file_of(record, ".parquet"))
        schemas.add(pq.read_schema(parquet))
        rows = pq.read_table(parquet).to_pylist()
        assert len(rows) == record["info"]["rows"] == 8
        seen += [row["source_row"] for row in rows]
        samples = list(tars.read(tar))
        for sample, row in zip(samples, metadata(dataset, record), strict=True):
            number = numbers.pop(0)
            assert sample["__key__"] == row["key"] == f"{number // 8:05d}{number % 8:04d}"
            assert (row["caption"], row["similarity"]) == (f"picture {number}", number / 4)
            assert row["label"] == (number if shard else None)
            assert (row["width"], row["height"], row["original_width"]) == (32 + number, 40, 64 + 2 * number)
            assert row["original_sha256"] == f"{number:064x}"
        assert [(row["status"], row["url"], row["error_message"]) for row in rows[6:]] == [
            ("failed_to_download", f"http://***@example.org/{number}.jpg",
             f"<urlopen error of http://***@example.org/{number}.jpg>") for number in (shard * 8 + 3, shard * 8 + 7)]
    assert not numbers and len(set(seen)) == 24 and len(schemas) == 1
    assert len(ledger(dataset, manifest)) == 6
    assert not any(b"hidden-word" in data for data in synthetic.files_below(tmp_path / "root").values())
    again = Adopt(dataset, ShardConfig(source=str(source)))
    assert run_stage(again) == manifest


def test_embeddings_of_adopted_shards_are_those_of_a_copy(tmp_path):
    source = write_download(tmp_path / "source")
    dataset, _ = adopt_source(tmp_path / "root", source)
    copy = Dataset.parse(str(tmp_path / "root"), "copy")
    run_stage(Shard(copy, ShardConfig(source=str(source), resize="no")))
    for variant in (dataset, copy):
        run_stage(Embed(variant, EmbedConfig(batch_size=4)))
        assert list(verify.find_faults(variant.root, variant.path("embeddings"))) == []
    assert np.array_equal(Embeddings(dataset).all(), Embeddings(copy).all())
    assert len(Embeddings(dataset)) == 12 and not np.isclose(np.ptp(Embeddings(dataset).all(), 0), 0).all()
    # `verify` finds a change to the tars.
    with open(source / "00001.tar", "r+b") as file:
        file.seek(1000)
        file.write(b"other")
    faults = list(verify.find_faults(dataset.root, dataset.path("shards")))
    assert [fault["path"] for fault in faults] == [str(source / "00001.tar")]
    assert list(verify.find_faults(copy.root, copy.path("shards"))) == []


def test_tars_in_a_bucket_are_adopted_there(tmp_path, s3):
    source = write_download(tmp_path / "source")
    for name, data in synthetic.files_below(source).items():
        storage.put_bytes(data, storage.join(s3, "downloads", name))
    local = adopt_source(tmp_path / "local", source)[0]
    for root in (tmp_path / "root", storage.join(s3, "root")):
        dataset, manifest = adopt_source(root, storage.join(s3, "downloads"))
        assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
        assert [file_of(record, ".tar")["name"] for record in manifest["items"]] == [
            f"{s3}/downloads/0000{number}.tar" for number in range(2)]
        for record, other in zip(manifest["items"], local.manifest("shards")["items"], strict=True):
            assert metadata(dataset, record) == metadata(local, other)
    assert {file["name"].rpartition("/")[2] for record in manifest["items"] for file in record["files"]} == {
        *(f"0000{number}.tar" for number in range(2)), *(f"00000{number}.{kind}" for number in range(2)
                                                         for kind in ("parquet", "jsonl"))}
    run_stage(Embed(dataset, EmbedConfig(batch_size=4)))
    run_stage(Embed(local, EmbedConfig(batch_size=4)))
    assert np.array_equal(Embeddings(dataset).all(), Embeddings(local).all())


def add_member(tar: Path, name: str, data: bytes = b"", **fields) -> None:
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        file.addfile(info, io.BytesIO(data))


def spoil(source: Path, how: str) -> None:
    tar = source / "00001.tar"
    if how == "cut in a member":
        os.truncate(tar, 5000)
    elif how == "cut between members":
        with tarfile.open(tar) as file:
            end = file.getmembers()[3].offset
        os.truncate(tar, end)
    elif how == "no tar":
        tar.write_bytes(b"\xff" * 2000)
    elif how == "joined":
        tar.write_bytes(tar.read_bytes() + (source / "00000.tar").read_bytes())
    elif how == "zeroed":
        data = tar.read_bytes()
        start = data.index(b"000010001.jpg") + 1000
        tar.write_bytes(data[:start] + bytes(3000) + data[start + 3000:])
    elif how == "compressed":
        tar.write_bytes(gzip.compress(tar.read_bytes()))
    elif how == "apart":
        add_member(tar, "000010000.cls", b"1")
    elif how == "lies outside":
        add_member(tar, "../x.jpg")
    elif how == "link":
        add_member(tar, "000010009.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    elif how == "hidden":
        add_member(tar, "below/._x.jpg", b"of a Mac")
    elif how == "twice":
        add_member(tar, "000010006.jpg", b"another")
    elif how == "no picture":
        add_member(tar, "000010009.txt", b"words")
    elif how == "one too many":
        add_member(tar, "000010009.jpg", encoded(noise(8, 8), "JPEG"))
    elif how == "no parquet":
        (source / "00001.parquet").write_bytes(b"PAR1 or what")
    elif how == "not UTF-8":
        add_member(tar, "\udcff.jpg", encoded(noise(8, 8), "JPEG"))


@pytest.mark.parametrize(("how", "message"), [
    ("cut in a member", r"00001\.tar is cut off or damaged: in the middle of 00001000\d\.\w+; bytes 4096 to 5000 are "
                        r"lost; .*\nhint: shard it without --adopt"),
    ("cut between members", r"00001\.tar is cut off or damaged: between two members"),
    ("no tar", r"00001\.tar is cut off or damaged: where"),
    ("joined", r"00001\.tar continues with another tar after the end mark at byte \d+, and .*\nhint: shard it without"),
    ("zeroed", r"00001\.tar is cut off or damaged: zeros from the middle of .*; bytes \d+ to \d+ are lost; "),
    ("compressed", r"00001\.tar is compressed \(gzip\)"), ("apart", "members of a sample do not follow each other"),
    ("lies outside", r"1 members are not adopted, the first is \.\./x\.jpg: its path leads outside"),
    ("link", "neither file nor folder"), ("hidden", "a hidden file in a folder"),
    ("twice", "two samples with one key follow each other"),
    ("no picture", "the sample 000010009 has no image, it has txt"),
    ("one too many", r"00001\.tar has 7 samples, .*00001\.parquet says 6"),
    ("no parquet", r"00001\.parquet cannot be read as parquet"), ("not UTF-8", "is not UTF-8"),
])
def test_tars_that_may_disagree_with_their_metadata_are_refused(tmp_path, how, message):
    source = write_download(tmp_path / "source")
    spoil(source, how)
    before = state(source)
    with pytest.raises(StageFailed, match=message):
        adopt_source(tmp_path / "root", source)
    assert state(source) == before
    dataset = Dataset.parse(str(tmp_path / "root"), "old")
    assert not storage.exists(storage.join(dataset.folder("shards"), "manifest.json"))


def test_unusual_but_valid_tars_are_adopted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    jpeg = encoded(noise(16, 16), "JPEG")
    odd = b'{"width": 99999999999, "original_width": true, "x": "\\ud83d"}'
    for name, data in (("./a.jpg", jpeg), ("./a.json", odd),
                       ("below/b.PNG", encoded(noise(16, 16), "PNG")), ("below/b.json", b"no JSON"),
                       ("c.jpg", b"no picture"), ("c.txt", b"words"), ("README", b"no key"), (".hidden.jpg", jpeg),
                       ("__meta__/d.jpg", jpeg), ("d.jpg", jpeg), ("d.seg.png", jpeg)):
        add_member(source / "a.tar", name, data)
    dataset, manifest = adopt_source(tmp_path / "root", source)
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    rows = metadata(dataset, manifest["items"][0])
    assert [row["key"] for row in rows] == ["./a", "below/b", "c", "d"]
    assert [row["width"] for row in rows] == [16, 16, None, 16] and rows[0]["x"] == "?"
    assert manifest["totals"]["noted"] == {"json_unreadable": 1, "unreadable": 1, "ignored_member": 3,
                                            "cell_changed": 1}
    assert manifest["totals"]["skipped"] == {}
    run_stage(Embed(dataset, EmbedConfig(batch_size=4)))
    assert Embeddings(dataset).all().any(1).tolist() == [True, True, False, True]


def test_a_tar_that_is_named_twice_is_adopted_once(tmp_path, caplog):
    source = write_download(tmp_path / "source", shards=2)
    config = ShardConfig(source=(str(source), str(source / "00001.tar"), f"{source}/*.tar"))
    manifest = run_stage(Adopt(Dataset.parse(str(tmp_path / "root"), "old"), config))
    assert [file_of(record, ".tar")["name"] for record in manifest["items"]] == [
        f"{source}/00000.tar", f"{source}/00001.tar"]
    assert manifest["totals"]["samples"] == 12
    assert "3 files are named twice and taken once" in caplog.text


def test_tars_in_the_folder_of_the_dataset_are_refused(tmp_path):
    dataset = Dataset.parse(str(tmp_path), "old")
    source = write_download(Path(dataset.folder("shards")))
    before = state(source)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="lies where the dataset is written"):
            run_stage(Adopt(dataset, ShardConfig(source=str(source))), overwrite=overwrite)
    assert state(source) == before


def test_a_folder_without_tars_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    tars.write(tmp_path / "empty tar.tar", [])
    with pytest.raises(StageFailed, match=r"empty tar\.tar can be adopted: 1 tars without a sample\nhint"):
        adopt_source(tmp_path / "empty root", tmp_path / "empty tar.tar")
    with pytest.raises(ValueError, match="--adopt takes tars as they are, and not image_key"):
        Adopt(Dataset.parse(str(tmp_path), "old"), ShardConfig(source=str(tmp_path), image_key="png"))
    for source, message in ((tmp_path / "empty", r"no files ending in \.tar"), ("", "--adopt needs a source"),
                            (tmp_path / "absent", "there is no file or folder")):
        with pytest.raises(ValueError, match=message):
            adopt_source(tmp_path / "root", source)
    assert not (tmp_path / "root").exists()
