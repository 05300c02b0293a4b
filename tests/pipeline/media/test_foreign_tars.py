"""Tars that continue after an end mark or after damage, and samples with distant members."""

import io
import itertools
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.media.foreign_tars import recovery
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from tests.pipeline.media.test_hostile_tars import END, file

CONTENT = b"\xff" * 700


def tar_of(names: list[str], tar_format: int = tarfile.USTAR_FORMAT, content: bytes = CONTENT) -> bytes:
    """A tar in which the content of each member is its name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = name.encode() + content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def names_of(keys: str, *suffixes: str) -> list[str]:
    return [f"{key}.{suffix}" for key in keys for suffix in suffixes or ("jpg", "txt")]


def read(data: bytes, **options: Any) -> tuple[dict[str, list[str]], TarFaults]:
    """The suffixes of each sample by key, and the faults. Each content is compared with its name."""
    faults, samples = TarFaults(), list[tuple[str, list[str]]]()
    for sample in read_foreign_tar(io.BytesIO(data), faults, **options):
        key = sample.pop("__key__")
        samples.append((key, list(sample)))
        assert all(content.startswith(f"{key}.{suffix}".encode()) for suffix, content in sample.items())
    assert len(dict(samples)) == len(samples)
    return dict(samples), faults


def reasons(faults: TarFaults) -> list[str]:
    return [str(damage) for damage in faults.damages]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("ends", ["records", "blocks"])
def test_concatenated_tars_are_read_to_the_end(tar_format, ends):
    parts = [tar_of(names_of(keys), tar_format) for keys in ("abcd", "efg", "hi")]
    if ends == "blocks":  # as programs in Go and Rust write them
        parts = [part.rstrip(b"\0") + bytes(-len(part.rstrip(b"\0")) % 512) + END for part in parts]
    samples, faults = read(b"".join(parts))
    assert list(samples) == list("abcdefghi") and set(map(tuple, samples.values())) == {("jpg", "txt")}
    assert faults.damages == [] and len(faults.end_marks) == 2
    assert faults.remarks("x.tar") == []


def test_concatenated_tars_with_equal_keys_give_all_samples():
    faults = TarFaults()
    samples = list(read_foreign_tar(io.BytesIO(2 * tar_of(names_of("abc")) + tar_of(names_of("abc", "jpg"))), faults))
    assert [sample["__key__"] for sample in samples] == list("abcabcabc") and not faults.members
    assert [len(sample) for sample in samples] == [3] * 6 + [2] * 3


def test_zeros_after_the_end_are_damage_only_inside_a_member():
    whole = tar_of(names_of("abc"))
    assert read(whole + bytes(100_000)) == read(whole)
    assert read(whole + bytes(100_000))[1].damages == []
    for kept in (4200, 5700):  # in the middle of a member: the first of its sample, and the last
        samples, faults = read(whole[:kept] + bytes(200_000))
        assert list(samples) == ["a"]
        damage, = faults.damages
        assert "zeros from the middle of b." in damage.why and damage.end == kept + 200_000


@pytest.mark.parametrize(("start", "end", "lost"), [
    ("b.jpg + 600", "c.txt + 700", "bc"), ("b.jpg + 600", "c.txt + 0", "bc"), ("b.jpg + 0", "b.txt + 0", "b"),
    ("b.jpg + 0", "c.jpg + 0", "b"), ("b.jpg + 0", "e.jpg + 0", "bcd"), ("a.jpg + 0", "a.txt + 0", "a"),
    ("e.jpg + 100", "e.txt + 100", "e")])
def test_a_zeroed_range_costs_the_samples_in_it(start, end, lost):
    data = tar_of(names_of("abcdef"))
    first, last = (data.index(place.split()[0].encode()) + int(place.split()[2]) for place in (start, end))
    samples, faults = read(data[:first] + bytes(last - first) + data[last:])
    assert list(samples) == [key for key in "abcdef" if key not in lost]
    assert set(map(tuple, samples.values())) == {("jpg", "txt")}
    damage, = faults.damages
    assert damage.start <= first and last <= damage.end
    assert faults.remarks("x.tar") == [("x.tar", "tar_cut", str(damage))]
    assert f"bytes {damage.start} to {damage.end} are lost" in str(damage)


def test_a_cut_tar_before_another_one_loses_only_its_end():
    first, second = tar_of(names_of("abcd")), tar_of(names_of("efgh"))
    for kept in (first.index(b"c.txt") + 100, first.index(b"c.txt") + 1111):
        samples, faults = read(first[:kept] + second)
        assert list(samples) == list("abefgh"), kept
        damage, = faults.damages
        assert damage.end == kept and "sample c beside it is not whole" in str(damage)


def test_bytes_after_the_end_that_are_no_tar_are_damage():
    samples, faults = read(tar_of(names_of("ab")) + b"a signature")
    assert list(samples) == ["a", "b"] and reasons(faults) == [
        "bytes after the end mark that are no tar; bytes 10240 to 10251 are lost"]


def test_a_name_without_its_extended_header_is_not_used():
    long_name = f"{'x' * 150}.jpg"
    data = tar_of(["a.jpg", long_name, "b.jpg"], tarfile.GNU_FORMAT)
    start = data.index(b"././@LongLink")
    samples, faults = read(data[:start] + b"#" + data[start + 1:])
    assert list(samples) == ["a", "b"] and len(faults.damages) == 1


def test_the_number_of_named_damages_is_bounded(monkeypatch):
    monkeypatch.setattr(recovery, "_MOST_DAMAGES", 10)
    damaged = b"#" + file("x.jpg", b"x")[1:]
    data = b"".join(file(f"{number}.jpg", f"{number}.jpg".encode()) + damaged for number in range(50)) + END
    samples, faults = read(data)
    assert len(samples) == 50 and len(faults.damages) == 10
    assert faults.damages[-1].why == "more than 10 damaged places" and faults.damages[-1].end == len(data)


@pytest.mark.parametrize("order", [
    names_of("abc", "jpg") + names_of("abc", "txt") + names_of("abc", "json"),
    names_of("cab", "txt") + names_of("bca", "json", "jpg"), names_of("ab", "jpg", "txt") + names_of("c", "jpg", "txt")
    + names_of("bca", "json")])
@pytest.mark.parametrize("divide_names", [False, True])
def test_members_that_lie_apart_are_joined_by_key(order, divide_names):
    samples, faults = read(tar_of(order), divide_names=divide_names)
    assert list(samples) == list(dict.fromkeys(name[0] for name in order))
    assert {key: set(suffixes) for key, suffixes in samples.items()} == {key: {"jpg", "txt", "json"} for key in "abc"}
    assert faults.is_apart and not faults.members and not faults.damages
    joined, _ = read(tar_of(order[:4]) + tar_of(order[4:]), divide_names=divide_names)  # in several tars, too
    assert joined == samples


def test_a_key_that_occurs_again_with_the_same_kind_is_another_sample():
    faults = TarFaults()
    data = tar_of(["a.jpg", "a.txt", "b.jpg", "a.png", "a.json", "b.txt", "a.jpg"])
    samples = list(read_foreign_tar(io.BytesIO(data), faults))
    assert [(sample["__key__"], *list(sample)[1:]) for sample in samples] == [
        ("a", "jpg", "txt"), ("b", "jpg", "txt"), ("a", "png", "json"), ("a", "jpg")]


def test_names_with_dots_of_a_key_with_several_images_are_split_at_the_last_dot():
    names = ["x/i.2020.01.jpg", "x/i.2020.01.txt", "x/i.2021.jpg", "x/i.2021.txt", "k.jpg", "k.seg.png",
             "d.0.jpg"]
    samples, faults = read(tar_of(names), divide_names=True)
    assert samples == {"x/i.2020.01": ["jpg", "txt"], "x/i.2021": ["jpg", "txt"], "k": ["jpg", "seg.png"],
                     "d.0": ["jpg"]}
    (name, reason, detail), = faults.remarks("x.tar")
    assert (name, reason) == ("x.tar", "names_divided") and detail.startswith("2 keys have several images")
    assert list(read(tar_of(names))[0]) == ["x/i", "k", "d"]
    frames = [f"frame.{number:05d}.jpg" for number in range(1500)]
    samples, faults = read(tar_of(frames, content=b""), divide_names=True)
    assert len(samples) == 1500 and not faults.members


@pytest.mark.slow
def test_the_index_takes_few_bytes_for_each_member(tmp_path: Path):
    peaks = []
    for count in (1000, 21_000):
        members = (file(f"{number:09d}.{suffix}", b"x") for suffix in ("jpg", "txt") for number in range(count))
        (tmp_path / "some.tar").write_bytes(b"".join(itertools.chain(members, [END])))
        tracemalloc.start()
        assert sum(len(sample) == 3 for sample in read_foreign_tar(tmp_path / "some.tar", TarFaults())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 40_000 < 150
