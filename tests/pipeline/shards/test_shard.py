import csv
import hashlib
import io
import json
import os
import resource
import signal
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.media import tars
from pipeline.shards.packer import Spool
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.worker import process_and_commit
from pipeline.versions import verify
from tests.pipeline import synthetic
from tests.pipeline.media.sample_images import png
from tests.pipeline.synthetic import encoded, noise

ACCENT = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
OTHER_ACCENT = unicodedata.normalize("NFD", f"{ACCENT[-1]}t{ACCENT[-1]}")


def shard_source(root, source, **options) -> tuple[Dataset, dict]:
    """The folder `source` made into a dataset `x` of small shards, and its manifest."""
    dataset = Dataset.parse(str(root), "x")
    settings = {"samples_per_shard": 7, "image_size": 16, "max_pixels": 1_000_000} | options
    return dataset, run_stage(Shard(dataset, ShardConfig(source=str(source), **settings)))


def table(dataset: Dataset, manifest: dict) -> list[dict]:
    """All parquet rows, failed ones included."""
    return [row for record in manifest["items"] for row in pq.read_table(io.BytesIO(storage.read_bytes(
        storage.join(dataset.folder("shards"), f"{record['id']}.parquet")))).to_pylist()]


def ledger(dataset: Dataset, manifest: dict) -> list[dict]:
    """All lines of the ledger."""
    names = [file["name"] for record in manifest["items"] for file in record["files"] if "ledger" in file["name"]]
    return [json.loads(line) for name in names
            for line in storage.read_bytes(storage.join(dataset.folder("shards"), name)).splitlines()]


def write_images(folder, names="abc", size=16):
    """A folder with one small image of each name."""
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(encoded(noise(size, size, number), "PNG"))
    return folder


BAD = {"truncated.jpg": "corrupt", "text.jpg": "not_a_picture", "empty.png": "empty_file", "header.png":
       "too_many_pixels", "large.png": "too_many_pixels", "hairline.png": "too_narrow", "absent.jpg": "picture_missing",
       "../../etc/passwd": "picture_missing", "/etc/passwd.png": "picture_missing",
       "../outside.png": "picture_missing"}


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """A folder with the kinds of files that real folders have."""
    folder = tmp_path_factory.mktemp("everything") / "source"
    folder.mkdir()
    (folder.parent / "outside.png").write_bytes(encoded(noise(16, 16), "PNG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    files = {
        "truncated.jpg": encoded(noise(64, 64), "JPEG")[:3000], "text.jpg": b"no picture", "empty.png": b"",
        "header.png": png(50_000, 50_000, 8, 2, b""), "large.png": encoded(Image.new("1", (1100, 1000)), "PNG"),
        "hairline.png": encoded(Image.new("RGB", (5000, 1)), "PNG"),
        "cmyk.jpg": encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"),
        "palette.png": encoded(Image.new("P", (16, 16)), "PNG", transparency=0),
        "deep.png": encoded(Image.fromarray(np.full((16, 16), 32768, np.uint16)), "PNG"),
        "bits.png": encoded(Image.new("1", (16, 16), 1), "PNG"),
        "veil.png": encoded(Image.new("LA", (16, 16), (0, 0)), "PNG"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "turned.jpg": encoded(noise(40, 20), "JPEG", exif=exif), "with space.PNG": encoded(noise(20, 20, 1), "PNG"),
        f"{ACCENT}.png": encoded(noise(20, 20, 2), "PNG"), f"{OTHER_ACCENT}.png": encoded(noise(20, 20, 3), "PNG"),
        "stem.png": encoded(noise(20, 20, 4), "PNG"), "stem.jpg": encoded(noise(20, 20, 5), "JPEG"),
        "below/it/deep down.png": encoded(noise(20, 20, 6), "PNG"), "twice.png": encoded(noise(20, 20, 7), "PNG"),
        "notes.txt": b"not looked at", ".hidden.png": encoded(noise(9, 9), "PNG"),
        "exact.png": encoded(noise(16, 16, 8), "PNG"),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with open(os.fsencode(folder) + b"/not\xffutf8.png", "wb") as file:
        file.write(encoded(noise(20, 20, 9), "PNG"))
    os.symlink(folder / "exact.png", folder / "linked.png")
    rows = [*BAD, *(name for name in files if name not in {"notes.txt", ".hidden.png", "bits.png", "stem.png",
                                                           "stem.jpg"} and name not in BAD), "twice.png", "stem"]
    # The accents are spelled here the other way round than on the disk.
    other = {f"{ACCENT}.png": unicodedata.normalize("NFD", f"{ACCENT}.png"),
             f"{OTHER_ACCENT}.png": unicodedata.normalize("NFC", f"{OTHER_ACCENT}.png")}
    with open(folder / "captions.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "file", "licence"])
        writer.writerows([f'the "{name}",\nin two lines', other.get(name, name), "CC0"] for name in rows)
    return folder


@pytest.mark.parametrize("only_captioned", [False, True])
def test_every_file_is_a_sample_or_has_a_reason(tmp_path, mixed_folder, only_captioned):
    dataset, manifest = shard_source(tmp_path, mixed_folder, only_captioned=only_captioned)
    plan = storage.read_json(storage.join(dataset.folder("shards"), "plan.json"))
    lists = {item["id"]: item["inputs"]["rows"] for item in plan["items"]}
    totals, rows = manifest["totals"], table(dataset, manifest)
    assert totals["samples"] + sum(totals["skipped"].values()) == len(rows) == sum(
        1 for record in manifest["items"] for _ in storage.read_bytes(
            storage.join(dataset.folder("shards"), lists[record["id"]])).splitlines())
    assert totals["skipped"] == dict(Counter(BAD.values()))
    failed = {row["url"]: row["error_message"].split(":")[0] for row in rows if row["status"] != "success"}
    assert failed == BAD
    lines = ledger(dataset, manifest)
    assert {line["key"]: line["reason"] for line in lines if not line["kept"]} == BAD
    missing = [] if only_captioned else ["bits.png", "linked.png", "not\\xffutf8.png"]
    assert Counter((line["key"], line["reason"]) for line in lines if line["kept"]) == Counter([
        *((name, "animated") for name in ("moving.gif", "moving.webp")), ("twice.png", "caption_twice"),
        *((name, "caption_missing") for name in missing)])
    good = {row["url"]: row for row in rows if row["status"] == "success"}
    assert len(good) == totals["samples"]
    for name in (f"{ACCENT}.png", f"{OTHER_ACCENT}.png", "with space.PNG", "below/it/deep down.png", "twice.png"):
        assert good[name]["caption"] == f'the "{name}",\nin two lines' and good[name]["licence"] == "CC0"
    assert good["stem.png"]["caption"] == good["stem.jpg"]["caption"] == 'the "stem",\nin two lines'
    assert (good["turned.jpg"]["original_width"], good["turned.jpg"]["original_height"]) == (20, 40)
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []


def test_webdataset_reads_the_same_samples(tmp_path, mixed_folder):
    dataset, manifest = shard_source(tmp_path, mixed_folder, format="png")
    rows = [row for row in table(dataset, manifest) if row["status"] == "success"]
    tars = [storage.join(dataset.folder("shards"), f"{record['id']}.tar") for record in manifest["items"]]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert len({row["key"] for row in rows}) == len(rows)
    shown = {}
    for sample, row in zip(samples, rows, strict=True):
        assert sample["txt"] == row["caption"] and sample["png"].shape == (16, 16, 3)
        start, length = row.pop("image_offset"), row.pop("image_bytes")
        image = Path(sample["__url__"]).read_bytes()[start:start + length]
        assert hashlib.sha256(image).hexdigest() == row["sha256"]
        assert sample["json"] | {"licence": None} == row | {"licence": None}
        shown[row["url"]] = sample["png"]
    for record in manifest["items"]:
        inside = metadata(dataset, record)
        assert len(inside) == record["samples"]
        with tarfile.open(storage.join(dataset.folder("shards"), f"{record['id']}.tar")) as tar:
            pictures = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".png")]
        assert [hashlib.sha256(data).hexdigest() for data in pictures] == [row["sha256"] for row in inside]
    assert np.abs(shown["cmyk.jpg"].astype(int) - [255, 0, 0]).max() < 5
    assert shown["palette.png"].min() == shown["bits.png"].min() == shown["veil.png"].min() == 255
    assert np.abs(shown["deep.png"].astype(int) - 128).max() <= 1
    for name in ("moving.gif", "moving.webp"):
        assert np.abs(shown[name].astype(int) - [255, 0, 0]).max() < 5


def test_bytes_that_need_no_change_are_passed_through(tmp_path, mixed_folder):
    dataset, manifest = shard_source(tmp_path, mixed_folder, format="png")
    row = next(row for row in table(dataset, manifest) if row["url"] == "exact.png")
    assert row["sha256"] == hashlib.sha256((mixed_folder / "exact.png").read_bytes()).hexdigest()
    kept, manifest = shard_source(tmp_path / "no", mixed_folder, format="jpg", resize="no")
    by_name = {row["url"]: row for row in table(kept, manifest)}
    jpeg = (mixed_folder / "stem.jpg").read_bytes()
    assert by_name["stem.jpg"]["sha256"] == hashlib.sha256(jpeg).hexdigest()
    assert (by_name["turned.jpg"]["width"], by_name["turned.jpg"]["height"]) == (20, 40)


def test_two_runs_give_the_same_bytes(tmp_path, mixed_folder):
    made_twice = []
    for name in ("one", "other"):
        dataset, manifest = shard_source(tmp_path / name, mixed_folder)
        made_twice.append((without_run_facts(manifest), {path: data for path, data in synthetic.files_below(
            tmp_path / name).items() if path.endswith((".tar", ".parquet", ".jsonl"))}))
        assert dataset.label == "x"
    assert made_twice[0] == made_twice[1]


def test_a_bucket_gives_the_same_dataset_as_a_folder(tmp_path, s3):
    source = synthetic.drawings(tmp_path / "source", subjects=2, size=16)
    (source / "with space.png").write_bytes(encoded(noise(16, 16), "PNG"))
    (source / "broken.png").write_bytes(b"no picture")
    for name, data in synthetic.files_below(source).items():
        storage.put_bytes(data, storage.join(s3, "source", name))
    storage.put_bytes(b"not in the folder", storage.join(s3, "source2", "other.png"))
    _, local = shard_source(tmp_path, source)
    remote_dataset, remote = shard_source(storage.join(s3, "root"), storage.join(s3, "source"))
    assert without_run_facts(local) == without_run_facts(remote)
    assert list(verify.find_faults(remote_dataset.root, remote_dataset.path("shards"))) == []
    for record in remote["items"]:
        assert len(metadata(remote_dataset, record)) == record["samples"]


def test_both_spellings_of_an_accent_may_be_two_files(tmp_path):
    source = write_images(tmp_path / "source", [ACCENT, unicodedata.normalize("NFD", ACCENT)])
    if len(list(source.iterdir())) < 2:
        pytest.skip("this file system holds them for one")
    dataset, manifest = shard_source(tmp_path, source)
    assert manifest["totals"]["samples"] == 2
    assert len({row["sha256"] for row in table(dataset, manifest)}) == 2


def shard_with_captions(tmp_path, columns: dict, **options) -> tuple[dict[str, dict], dict]:
    """Three images with a captions.parquet of these columns: parquet rows by file, and the manifest."""
    source = write_images(tmp_path / "source")
    pq.write_table(pa.table(columns), source / "captions.parquet")
    dataset, manifest = shard_source(tmp_path, source, **options)
    return {row["url"]: row for row in table(dataset, manifest)}, manifest


FILES = ["a.png", "./b.png", "c.png"]


@pytest.mark.parametrize(("captions", "expected"), [
    (["x", None, ""], ["x", "", ""]), ([["x", "y"], [], None], ["x", "", ""]),
    ([b"x", b"\xff", None], ["x", "\ufffd", ""]), ([1, None, 3], ["1", "", "3"]),
    ([0.5, float("nan"), None], ["0.5", "", ""]),
    (pa.array([0, 1, None], pa.timestamp("ns")), ["1970-01-01 00:00:00", "1970-01-01 00:00:00.000000001", ""]),
])
def test_captions_of_any_type_become_text(tmp_path, captions, expected):
    rows, _ = shard_with_captions(tmp_path, {"file": FILES, "TEXT": captions})
    assert [rows[f"{name}.png"]["caption"] for name in "abc"] == expected


def test_other_columns_of_any_type_are_kept(tmp_path):
    rows, manifest = shard_with_captions(tmp_path, {
        "image_path": FILES, "caption": ["x"] * 3, "similarity": [0.5, float("nan"), float("inf")],
        "hash": pa.array([2**64 - 1, 1, None], pa.uint64()), "signed": [-(2**63), None, 2**63 - 1],
        "tags": [["x"], None, []], "raw": [b"\xff", None, b""], "when": pa.array([0, 1, None], pa.timestamp("ns")),
        "safe": [True, None, False], "url": ["https://example.org"] * 3})
    assert [rows[f"{name}.png"]["similarity"] for name in "abc"] == [0.5, None, None]
    assert [rows[f"{name}.png"]["hash"] for name in "abc"] == [str(2**64 - 1), "1", None]
    assert [rows[f"{name}.png"]["signed"] for name in "abc"] == [-(2**63), None, 2**63 - 1]
    assert rows["a.png"]["tags"] == '["x"]' and rows["a.png"]["safe"] is True
    assert manifest["totals"]["samples"] == 3


def test_sample_json_is_strict(tmp_path):
    shard_with_captions(tmp_path, {"file": FILES, "caption": ["x"] * 3,
                                   "similarity": [0.5, float("nan"), float("inf")]})

    def refuse(constant):
        raise AssertionError(constant)
    with tarfile.open(tmp_path / "datasets/x/v1/shards/000000.tar") as tar:
        for name in tar.getnames():
            if name.endswith(".json"):
                json.loads(tar.extractfile(name).read(), parse_constant=refuse)


def test_caption_rows_without_a_file_name_are_counted(tmp_path):
    columns = {"file": ["a.png", None, "", "b.png"], "caption": ["x", "y", "z", "w"]}
    rows, manifest = shard_with_captions(tmp_path, columns, only_captioned=True)
    assert manifest["totals"]["samples"] == 2 and manifest["totals"]["skipped"] == {"picture_missing": 2}
    assert set(rows) == {"a.png", "b.png", "(row 2 of the captions)", "(row 3 of the captions)"}


def test_order_of_captions_is_the_order_of_samples(tmp_path):
    source = write_images(tmp_path / "source")
    (source / "list.csv").write_text("file,caption\nc.png,1\na.png,2\n")
    dataset, manifest = shard_source(tmp_path, source, captions=str(source / "list.csv"), only_captioned=True)
    assert [row["url"] for row in table(dataset, manifest)] == ["c.png", "a.png"]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("captions.csv", b"\xff\xfe\x00", "cannot be read as captions"),
    ("captions.csv", b"picture,words\na.png,x\n", "has the columns picture, words, and none of them names the files"),
    ("captions.csv", b"picture,words\n", "has the columns picture, words, and none of them names the files"),
    ("captions.csv", b"file,caption\na.png\n", "none of its 1 rows .* 1 cells, and the header has 2"),
    ("captions.parquet", b"no parquet at all", "cannot be read as captions"),
    ("captions.parquet", b"PAR1" + b"x" * 50 + b"\x30\0\0\0PAR1", "cannot be read as captions"),
])
def test_captions_that_cannot_be_used_are_refused(tmp_path, name, data, message):
    source = write_images(tmp_path / "source")
    (source / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        shard_source(tmp_path, source)
    assert not (tmp_path / "datasets").exists()


def test_missing_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty\nhint"):
        shard_source(tmp_path, tmp_path / "empty")
    with pytest.raises(ValueError, match="absent"):
        shard_source(tmp_path, tmp_path / "absent")
    source = write_images(tmp_path / "source")
    with pytest.raises(ValueError, match=r"none\.csv does not exist"):
        shard_source(tmp_path, source, captions=str(source / "none.csv"))
    with pytest.raises(ValueError, match="has no captions\nhint: --captions"):
        shard_source(tmp_path, source, only_captioned=True)
    with pytest.raises(ValueError, match="shard needs a source"):
        shard_source(tmp_path, "")


def test_broken_links_and_captions_outside_the_folder_are_not_read(tmp_path):
    source = write_images(tmp_path / "source", "a")
    (tmp_path / "secret.png").write_bytes(encoded(noise(16, 16, 99), "PNG"))
    os.symlink(tmp_path / "nowhere.png", source / "broken.png")
    names = ["a.png", "broken.png", "../secret.png", str(tmp_path / "secret.png"), "below/../../secret.png",
             "../secret"]
    (source / "captions.csv").write_text("file,caption\n" + "".join(f"{name},x\n" for name in names))
    dataset, manifest = shard_source(tmp_path, source)
    assert manifest["totals"]["samples"] == 1 and manifest["totals"]["skipped"] == {"picture_missing": 5}
    assert [row["url"] for row in table(dataset, manifest) if row["status"] == "success"] == ["a.png"]


def test_a_broken_link_that_no_caption_names_is_counted(tmp_path):
    source = write_images(tmp_path / "source", "a")
    os.symlink(tmp_path / "nowhere.png", source / "broken.png")
    _, manifest = shard_source(tmp_path, source)
    assert manifest["totals"]["skipped"] == {"picture_missing": 1}


def test_images_that_vanish_after_planning_are_counted(tmp_path):
    source = write_images(tmp_path / "source")
    dataset = Dataset.parse(str(tmp_path), "x")
    stage = Shard(dataset, ShardConfig(source=str(source), image_size=16))
    items = prepare(stage)
    (source / "b.png").unlink()
    record = process_and_commit(stage, items[0])
    assert record["samples"] == 2 and record["skipped"] == {"picture_missing": 1}


def test_other_images_on_a_claimed_folder_are_refused(tmp_path):
    source = write_images(tmp_path / "source")
    shard_source(tmp_path, source)
    shard_source(tmp_path, source)
    (source / "d.png").write_bytes(encoded(noise(16, 16, 9), "PNG"))
    with pytest.raises(ValueError, match=r"inputs\.pictures\.digest"):
        shard_source(tmp_path, source)
    with pytest.raises(ValueError, match=r"section\.image_size: there 16, now 8"):
        shard_source(tmp_path, write_images(tmp_path / "same"), image_size=8)


def test_the_same_images_elsewhere_are_the_same_dataset(tmp_path):
    _, first = shard_source(tmp_path, write_images(tmp_path / "source"))
    _, second = shard_source(tmp_path, write_images(tmp_path / "moved"))
    assert first == second


def test_a_shard_without_a_good_image_is_sealed(tmp_path):
    source = write_images(tmp_path / "source", "xyz")
    for number in range(7):
        (source / f"bad{number}.png").write_bytes(b"no picture")
    _, manifest = shard_source(tmp_path, source)
    assert [record["samples"] for record in manifest["items"]] == [0, 3]


@pytest.mark.parametrize("setting", ["samples_per_shard", "image_size", "max_pixels"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ValueError, match=setting):
        ShardConfig(**{setting: 0})


def test_a_tar_has_the_bytes_that_webdataset_writes(tmp_path):
    samples = [{"__key__": f"0000{number:03d}", "txt": b"x" * number, "jpg": bytes([number]) * (511 + number),
                "json": b"{}"} for number in range(40)]
    with open(tmp_path / "theirs.tar", "wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0, user="0",
                                                                            group="0") as theirs:
        for sample in samples:
            theirs.write(sample)
    tars.write(tmp_path / "ours.tar", samples)
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_a_full_disk_of_a_spool_is_named(tmp_path):
    """A nearly full disk accepts a part of a write, without an error."""
    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        spool = Spool(tmp_path / "spool")
        assert spool.get(spool.put(b"a" * 9_000)) == b"a" * 9_000
        with pytest.raises(OSError, match="File too large"):
            spool.put(b"b" * 5_000)
    assert synthetic.in_child(write) == 0
