"""Tars of other programs: compressed, concatenated, with distant members, several images of a key, dots in names."""

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.media.foreign_tars import packed
from pipeline.shards.adopt import Adopt
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, shard_source, stored_samples
from tests.pipeline.sources.test_tars import flatten, sample, write_tar

PNG = [PICTURES[f"{number:02d}.png"] for number in range(8)]


def rows_of(root: Path, source: object, **settings: Any) -> list[tuple[Any, ...]]:
    """Key, caption, and number of the image of each row."""
    dataset, manifest = shard_source(root, source, resize="no", format="png", **settings)

    numbers = {data: number for number, data in enumerate(PNG)}
    images = iter(stored_samples(dataset, manifest))
    return [(row["source_key"], row["caption"], numbers[next(images)["png"]] if row["status"] == "success" else None)
            for row in table(dataset, manifest)]


def notes(root: Path, source: object, **settings: Any) -> set[tuple[str, str, bool]]:
    dataset, manifest = shard_source(root, source, **settings)
    return {(line["key"], line["reason"], line["kept"]) for line in ledger(dataset, manifest)}


@pytest.mark.parametrize(("ending", "pack"), [
    (".tar.gz", gzip.compress), (".tgz", lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:])),
    (".tar.bz2", bz2.compress), (".tar.xz", lzma.compress),
    (".tar.zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    (".tar", gzip.compress)])
def test_compressed_tars_are_read_like_others(ending, pack, tmp_path, s3):
    data = write_tar(tmp_path / "plain" / "0.tar", flatten(*(sample(f"k{number}", number) for number in range(4)))
                     ).read_bytes()
    expected = [(f"k{number}", f"caption {number}", number) for number in range(4)]
    assert rows_of(tmp_path / "0", tmp_path / "plain") == expected
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / f"0{ending}").write_bytes(pack(data))
    assert rows_of(tmp_path / "1", tmp_path / "packed") == expected
    if ending == ".tar.zst":
        storage.put_bytes(pack(data), f"{s3}/packed/0{ending}")
        assert rows_of(tmp_path / "2", f"{s3}/packed") == expected


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_the_beginning_of_a_cut_compressed_tar_is_read(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_CHUNK_BYTES", 512)
    noise = random.Random(1)
    # More than a block of each compression.
    members = [[*sample(f"k{number}", number), (f"k{number}.bin", noise.randbytes(200_000))] for number in range(8)]
    data = write_tar(tmp_path / "0.tar", flatten(*members)).read_bytes()
    whole = pack(data)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "0.tar.gz").write_bytes(whole[:len(whole) * 3 // 4])
    assert notes(tmp_path / "1", tmp_path / "cut") == {
        ("0.tar.gz", "tar_cut", False), ("0.tar.gz", "unused_members", True)}
    monkeypatch.setattr(packed, "LEAST_LIMIT_BYTES", 0)
    monkeypatch.setattr(packed, "MOST_RATIO", 1)
    (tmp_path / "cut" / "0.tar.gz").write_bytes(whole)
    dataset, manifest = shard_source(tmp_path / "2", tmp_path / "cut")
    assert any(f"more than {len(whole)} bytes when unpacked" in line["detail"] for line in ledger(dataset, manifest))
    assert 0 < manifest["totals"]["samples"] < 8


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_bytes_between_joined_compressed_tars_are_reported(pack, tmp_path):
    first, second = (write_tar(tmp_path / f"{number}.tar", sample(f"k{number}", number)).read_bytes()
                     for number in range(2))
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "0.tar.gz").write_bytes(pack(first) + b"junkjunk" + pack(second))
    dataset, manifest = shard_source(tmp_path / "x", tmp_path / "joined")
    assert [row["source_key"] for row in table(dataset, manifest)] == ["k0"]
    assert manifest["totals"]["skipped"] == {"tar_cut": 1}
    (tmp_path / "joined" / "0.tar.gz").write_bytes(pack(first) + pack(second))
    assert [key for key, *_ in rows_of(tmp_path / "y", tmp_path / "joined")] == ["k0", "k1"]


def test_a_small_compressed_tar_that_is_cut_keeps_its_whole_samples(tmp_path):
    data = write_tar(tmp_path / "0.tar", flatten(*(sample(f"k{number}", number) for number in range(6)))).read_bytes()
    (tmp_path / "cut").mkdir()
    stored = gzip.compress(data, 0)
    (tmp_path / "cut" / "0.tar.gz").write_bytes(stored[:len(data) * 3 // 4])
    manifest = shard_source(tmp_path / "x", tmp_path / "cut")[1]
    assert manifest["totals"]["samples"] >= 3
    assert manifest["totals"]["skipped"] == {"tar_cut": 1}


def test_joined_tars_with_another_order_of_members_are_other_samples(tmp_path):
    first, second = sample("0", 0), sample("0", 1)
    path = write_tar(tmp_path / "tars" / "a.tar", [*first, *reversed(second), *sample("1", 2)])
    assert path.exists()
    assert rows_of(tmp_path / "x", tmp_path / "tars") == [("0", "caption 0", 0), ("0", "caption 1", 1),
                                                         ("1", "caption 2", 2)]


def test_members_without_a_sample_are_named(tmp_path):
    image = dict(sample("0", 0))["0.png"]
    names = ["1", "d/2", ".6.png", "d/@eaDir/0.png/SYNO.png", "Thumbs/1.png"]
    write_tar(tmp_path / "tars" / "a.tar", [*sample("0", 0), *((name, image) for name in names)])
    assert notes(tmp_path / "x", tmp_path / "tars") == {
        *((name, "ignored_member", True) for name in names[:3]), *((name, "hidden_member", True) for name in names[3:])}


def test_distant_captions_are_joined_also_in_concatenated_tars(tmp_path):
    members = [sample(f"k{number}", number) for number in range(4)]
    apart = [member for part in range(3) for member in (members[number][part] for number in range(4))]
    write_tar(tmp_path / "apart" / "0.tar", apart)
    expected = [(f"k{number}", f"caption {number}", number) for number in range(4)]
    assert rows_of(tmp_path / "0", tmp_path / "apart") == expected
    first, second = (write_tar(tmp_path / f"{number}.tar", flatten(*members[2 * number:2 * number + 2])).read_bytes()
                     for number in range(2))
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "0.tar").write_bytes(first + second)
    assert rows_of(tmp_path / "1", tmp_path / "joined") == expected
    assert not notes(tmp_path / "2", tmp_path / "apart") | notes(tmp_path / "3", tmp_path / "joined")


@pytest.mark.parametrize("adopt", [False, True])
def test_the_first_text_of_a_sample_that_is_not_empty_counts_and_changed_bytes_are_noted(adopt, tmp_path):
    members = [("0.png", PNG[0]), ("0.txt", b""), ("0.caption", b"kohya"), ("1.png", PNG[1]), ("1.txt", b"caf\xe9"),
               ("1.cls", b"\x80\x04K"), ("2.png", PNG[2]), ("2.txt", b""),
               ("2.json", b'{"caption": "a", "caption": "b"}')]
    path = write_tar(tmp_path / "a.tar", members)
    if adopt:
        dataset = Dataset.parse(str(tmp_path / "x"), "x")
        manifest = run_stage(Adopt(dataset, ShardConfig(source=(str(path),))))
    else:
        dataset, manifest = shard_source(tmp_path / "x", path)
    captions = [row["caption"] for record in manifest["items"] for row in metadata(dataset, record)]
    assert captions == ["kohya", "caf\ufffd", "b"]
    assert manifest["totals"]["noted"] == {"cell_changed": 3}


def test_captions_in_json_may_be_named_by_a_path_and_are_missed_elsewhere(tmp_path):
    source = write_tar(tmp_path / "0.tar", [
        ("0.png", PNG[0]), ("0.json", b'{"n": 1}'), ("1.png", PNG[1]),
        ("1.json", b'{"caption": "c", "m": {"t": "d"}}')])
    assert notes(tmp_path / "1", source) == {("0", "caption_missing", True)}
    assert rows_of(tmp_path / "2", source, caption_column="m.t") == [("0", "", 0), ("1", "d", 1)]


def test_a_suffix_chooses_one_of_several_images(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [
        ("a.left.png", PNG[0]), ("a.right.png", PNG[1]), ("a.long.txt", b"long a"), ("a.txt", b"short a"),
        ("b.right.png", PNG[2]), ("b.txt", b"short b"), ("c.left.PNG", PNG[3]), ("c.json", b'{"caption": "of c"}')])
    source = tmp_path / "tars"
    assert rows_of(tmp_path / "0", source, image_key="left.png") == [
        ("a", "short a", 0), ("b", "short b", None), ("c", "of c", 3)]
    assert rows_of(tmp_path / "1", source, image_key="right.png; .LEFT.png", caption_key="long.txt;txt") == [
        ("a", "long a", 1), ("b", "short b", 2), ("c", "", 3)]
    assert notes(tmp_path / "2", source, image_key="right.png;left.png", caption_key="long.txt") == {
        ("b", "caption_missing", True), ("c", "caption_missing", True)}
    # Without a key: b and c have one image each, and a has two beside members that belong to both.
    assert rows_of(tmp_path / "3", source) == [("a", "short a", None), ("b", "short b", 2), ("c", "of c", 3)]
    dataset, manifest = shard_source(tmp_path / "4", source)
    row = table(dataset, manifest)[0]
    assert row["error_message"] == ("picture_missing: the sample has several images: left.png, right.png; "
                                    "--image-key takes one")


def test_an_image_is_taken_and_its_mask_is_named(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [("a.mask.png", PNG[0]), ("a.png", PNG[1]), ("b.png", PNG[2])])
    assert rows_of(tmp_path / "0", tmp_path / "tars") == [("a", "", 1), ("b", "", 2)]
    assert notes(tmp_path / "1", tmp_path / "tars") == {("0.tar", "other_images", True)}
    assert notes(tmp_path / "2", tmp_path / "tars", image_key="png") == set()


def test_members_of_no_use_are_counted_by_suffix(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [*sample("a", 0), ("a.npy", b"x"), ("a.cls", b"1"), *sample("b", 1),
                                            ("b.npy", b"x"), ("b.info.bin", b"x")])
    dataset, manifest = shard_source(tmp_path / "0", tmp_path / "tars")
    assert [(entry["reason"], entry["detail"]) for entry in ledger(dataset, manifest)] == [
        ("unused_members", "2 .npy, 1 .info.bin")]


def test_names_with_dots_keep_their_images_captions_and_json(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [
        ("x/i.2020.01.png", PNG[0]), ("x/i.2020.01.txt", b"january"), ("x/i.2020.02.png", PNG[1]),
        ("x/i.2020.02.txt", b"february"), ("y.v1.png", PNG[2]), ("y.v1.json", json.dumps({"text": "of y"}).encode())])
    source = tmp_path / "tars"
    assert rows_of(tmp_path / "0", source) == [("x/i.2020.01", "january", 0), ("x/i.2020.02", "february", 1),
                                               ("y.v1", "of y", 2)]
    assert notes(tmp_path / "1", source) == {("0.tar", "names_divided", True)}


@pytest.mark.parametrize("suffix", ["img", "jfif", "jpe.jfif", "ppm", "tga", "jp2", "TIF", "hif", "jpe", "pgm"])
def test_all_suffixes_of_images_are_taken(suffix, tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [(f"a.{suffix}", PNG[0]), ("a.caption", b"of a")])
    assert rows_of(tmp_path / "0", tmp_path / "tars") == [("a", "of a", 0)]


def test_settings_for_tars_are_refused_elsewhere(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(PNG[0])
    with pytest.raises(ValueError, match=r"shard\.image_key: a setting for tars, and .* is no tar\nhint"):
        shard_source(tmp_path / "0", tmp_path / "folder", image_key="png")
    write_tar(tmp_path / "0.tar", sample("a", 0))
    with pytest.raises(ValueError, match=r"caption_key = 'txt', .*caption_column = 'text'.*\nhint"):
        shard_source(tmp_path / "1", tmp_path / "0.tar", caption_key="txt", caption_column="text")


def run_shard(root: Path, source: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["shard", "a", "--source", str(source), "--root", str(root), "--local", "--image-size", "8", *options])
    return code, capsys.readouterr().err


def test_the_share_of_good_rows_does_not_count_damages(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    members = flatten(*(sample(f"k{number}", number) for number in range(8)))
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(data[:5000])
    for number in range(1, 12):
        (tmp_path / "tars" / f"{number}.tar").write_bytes(b"\xff" * 3000)
    code, _ = run_shard(tmp_path / "root", tmp_path / "tars", capsys)
    text = caplog.text
    assert code == 0 and "less than 100.0% good" in text and "12 tar_cut" in text
    assert not re.search(r"-\d+\.\d% good", text)
    code, text = run_shard(tmp_path / "strict", tmp_path / "tars", capsys, "--max-failed", "0.5")
    assert code == 1 and re.search(r"12 of \d+ rows failed", text)


def test_an_empty_tar_is_named_and_a_source_of_empty_tars_is_refused(tmp_path, capsys):
    write_tar(tmp_path / "tars" / "0.tar", [])
    for options in ([], ["--max-failed", "0.1"], ["--duplicates", "exact"]):
        code, text = run_shard(tmp_path / f"root{options}", tmp_path / "tars", capsys, *options)
        assert code == 1 and "can be used: it is empty" in text
    code, text = run_shard(tmp_path / "adopted", tmp_path / "tars", capsys, "--adopt")
    assert code == 1 and "1 tars without a sample\nhint" in text
    write_tar(tmp_path / "tars" / "1.tar", sample("a", 1))
    assert notes(tmp_path / "two", tmp_path / "tars") == {("0.tar", "empty_tar", True)}
    assert run_shard(tmp_path / "adopted two", tmp_path / "tars", capsys, "--max-failed", "0")[0] == 0
