"""Braces, brackets and other patterns in names of sources, and names that have such letters."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.sources import patterns
from pipeline.sources.source import list_source_files
from tests.pipeline.shards.test_shard import table
from tests.pipeline.sources.list_datasets import shard_source
from tests.pipeline.sources.test_tars import sample, write_tar


def listed(base: Path | str, source: str) -> list[str]:
    return [url.removeprefix(f"{base}/") for url in list_source_files(f"{base}/{source}", "tars")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(13):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    for name in ("a/0.tar", "a/1.tar.gz", "b/2.tgz", "b/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("source", "expected"), [
    ("{00002..00000}.tar", ["00002.tar", "00001.tar", "00000.tar"]),
    ("{00000..00012..6}.tar", ["00000.tar", "00006.tar", "00012.tar"]),
    ("0000[7-9].tar", ["00007.tar", "00008.tar", "00009.tar"]), ("0001[!0-1].tar", ["00012.tar"]),
    ("{b,a}/*", ["b/2.tgz", "a/0.tar", "a/1.tar.gz"]), ("{a/0.tar,*/0.tar}", ["a/0.tar"]),
    ("**/?.tar*", ["a/0.tar", "a/1.tar.gz"]), ("b", ["b/2.tgz"]), ("b/3.txt", ["b/3.txt"])])
def test_patterns_match_files(folder, s3, source, expected):
    assert listed(folder, source) == expected
    if source in {"{00002..00000}.tar", "0000[7-9].tar"}:
        for name, _ in storage.walk(str(folder)):
            storage.put_bytes(b"", f"{s3}/{name}")
        assert listed(s3, source) == expected


def test_a_file_that_braces_name_must_exist(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"stands for 15 names, and 2 of them do not exist: .*00013\.tar, .*00014"):
        listed(folder, "{00000..00014}.tar")
    with pytest.raises(ValueError, match=r"stands for 2 names, and 1 of them do not exist: .*/c/\*\n"):
        listed(folder, "{a,c}/*")
    with pytest.raises(ValueError, match=r"cannot be expanded.*\nhint"):
        listed(folder, "{00000..00012.tar")
    monkeypatch.setattr(patterns, "_MOST_NAMES", 5)
    with pytest.raises(ValueError, match=r"stand for more than 5 names\nhint"):
        listed(folder, "{00000..99999999999}.tar")


def test_existing_names_win_over_patterns(tmp_path):
    names = ["[0-9].tar", "{a,b}.tar", "what?.tar", "a*.tar", "LAION [art] {1}/x.tar", "LAION [art] {1}/y.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for other in ("0.tar", "a.tar", "whats.tar", "ab.tar"):
        (tmp_path / other).write_bytes(b"")
    for name in names:
        assert listed(tmp_path, name) == [name]
    assert listed(tmp_path, "LAION [art] {1}") == listed(tmp_path, "LAION [art] {1}/*.tar") == names[-2:]
    assert listed(tmp_path, "LAION [art] {1}/{y,x}.tar") == names[:-3:-1]


def test_tars_are_sharded_in_the_order_of_the_braces(tmp_path):
    for number in range(3):
        write_tar(tmp_path / "set [1]" / f"{number}.tar", sample(f"key{number}", number))
    dataset, manifest = shard_source(tmp_path, tmp_path / "set [1]" / "{2..1}.tar")
    assert [record["samples"] for record in manifest["items"]] == [1, 1]
    assert [row["source_key"] for row in table(dataset, manifest)] == ["key2", "key1"]
