"""Tars that attack their reader are skipped: no endless loop, no recursion, bounded memory."""

import io
import itertools
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.media import tars
from pipeline.media.foreign_tars import samples as foreign_samples
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from pipeline.media.tar_members import BLOCK, DamagedTar, list_members, parse_header
from pipeline.stages.types import StageFailed
from tests.pipeline.sources.list_datasets import PICTURES, shard_source

END = bytes(2 * BLOCK)


def header(name: str = "1.png", size: int = 0, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def with_size_field(block: bytes, field: bytes) -> bytes:
    """A header with other bytes in its size, and the checksum for them."""
    changed = bytearray(block)
    changed[124:136] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = next(number for number in itertools.count(len(text)) if number == len(text) + len(str(number)))
        data += str(length).encode() + text
    return header("pax", len(data), kind) + padded(data)


GOOD = file("0.png", PICTURES["00.png"]) + file("0.txt", b"good")
HOSTILE: dict[str, Callable[[], bytes]] = {
    "unknown kind with a negative size": lambda: with_size_field(header(kind=b"?"), b"\xff" * 11 + b"\0"),
    "unknown kind that leads back": lambda: with_size_field(header(kind=b"?"), b"\xff" * 10 + b"\xfa\x00"),
    "negative size in octal": lambda: with_size_field(header(), b"-0000001000\0"),
    "pax size that is negative": lambda: pax({"size": "-512"}) + header(),
    "5,000 pax headers": lambda: pax({"path": "1.png"}) * 5000 + file("1.png", b"x"),
    "5,000 global headers": lambda: pax({"comment": "x"}, b"g") * 5000 + file("1.png", b"x"),
    "5,000 long names": lambda: (header("././@LongLink", 6, b"L") + padded(b"1.png\0")) * 5000 + file("1.png", b"x"),
    "5,000 long links": lambda: (header("././@LongLink", 6, b"K") + padded(b"1.png\0")) * 5000 + file("1.png", b"x"),
    "pax header of 2 MB": lambda: pax({"comment": "x" * (2 << 20)}) + file("1.png", b"x"),
    "pax header beyond the file": lambda: with_size_field(header(kind=b"x"), b"\x80" + bytes(3) + b"\x7f" * 8),
    "long name beyond the file": lambda: with_size_field(header(kind=b"L"), b"\x80" + bytes(3) + b"\x7f" * 8),
    "pax record longer than its header": lambda: header("pax", 20, b"x") + padded(b"999999999 path=1.png\n"),
    "global header with a path": lambda: pax({"path": "1.png"}, b"g") + file("1.png", b"x"),
    "size beyond the file": lambda: header("1.png", 8**11 - 1),
    "size beyond the file in base 256": lambda: with_size_field(header(), b"\x80" + b"\x7f" * 11),
    "pax size beyond the file": lambda: pax({"size": "9" * 300}) + header(),
    "unknown kind beyond the file": lambda: with_size_field(header(kind=b"?"), b"\x80" + b"\x7f" * 11),
    "a wrong checksum": lambda: b"#" + file("1.png", b"x")[1:],
    "holes without an end": lambda: header(kind=b"S")[:482] + b"\1" + header(kind=b"S")[483:],
    "an extended header at the end": lambda: pax({"path": "1.png"}) + END,
}


def samples(path: Path) -> tuple[list[str], TarFaults, int, float]:
    """The keys of a tar's samples, its faults, the peak of memory and the seconds."""
    faults, begun = TarFaults(), time.perf_counter()
    tracemalloc.start()
    try:
        keys = [sample["__key__"] for sample in read_foreign_tar(path, faults)]
        return keys, faults, tracemalloc.get_traced_memory()[1], time.perf_counter() - begun
    finally:
        tracemalloc.stop()


ENDS_WELL = {"5,000 pax headers", "5,000 global headers", "5,000 long names", "5,000 long links", "pax header of 2 MB",
             "global header with a path"}
"""After these, the member that has the hostile headers is found by its own header."""


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(30)
def test_a_hostile_tar_loses_its_damaged_part_and_is_one_fault(name, tmp_path):
    path = tmp_path / "some.tar"
    path.write_bytes(GOOD + HOSTILE[name]() + file("2.png", b"x") + file("2.txt", b"good") + END)
    keys, faults, peak, seconds = samples(path)
    assert keys == ["0", "2"]
    damage, = faults.damages
    assert damage.start == len(GOOD) < damage.end <= path.read_bytes().rindex(file("2.png", b"x"))
    assert ("sample 1 beside it is not whole" in str(damage)) == (name in ENDS_WELL)
    assert faults.members == []
    assert peak < 4 << 20 and seconds < 10
    with pytest.raises(ValueError, match=r"some\.tar is cut off .*\nhint"):
        list(tars.read(path))
    if "beyond the file" not in name:  # such a member may be the image itself, and says so when it is read
        assert len(tars.TarImages(path)) == 1


@pytest.mark.timeout(60)
def test_hostile_tars_are_skipped_and_the_corpus_is_sealed(tmp_path):
    (tmp_path / "tars").mkdir()
    for number, make in enumerate(HOSTILE.values()):
        (tmp_path / "tars" / f"{number:02d}.tar").write_bytes(make() + END)
    (tmp_path / "tars" / "zz.tar").write_bytes(GOOD + END)
    _, manifest = shard_source(tmp_path, tmp_path / "tars", image_size=8)
    assert manifest["totals"]["samples"] == 1
    assert manifest["totals"]["skipped"] == {"tar_cut": len(HOSTILE), "not_a_picture": len(ENDS_WELL)}
    (tmp_path / "tars" / "zz.tar").unlink()
    with pytest.raises(StageFailed, match=f"no image of .* {len(HOSTILE)} tar_cut"):
        shard_source(tmp_path / "none", tmp_path / "tars")


@pytest.mark.parametrize("encoding", [
    lambda name: header("././@LongLink", len(name.encode()) + 1, b"L") + padded(name.encode() + b"\0"),
    lambda name: pax({"path": name}), lambda name: pax({"GNU.sparse.name": name})], ids=["long", "pax", "sparse"])
def test_a_member_with_a_name_of_100_kb_is_skipped(encoding, tmp_path):
    for letter in ("x", "ż"):
        (tmp_path / "some.tar").write_bytes(
            GOOD + encoding(letter * (100_000 // len(letter.encode())) + ".png") + file("1.png", b"x")
            + file("2.png", b"x") + END)
        keys, faults, peak, _ = samples(tmp_path / "some.tar")
        assert keys == ["0", "2"] and not faults.cut and peak < 4 << 20
        (name, reason, detail), = faults.members
        assert len(name) < 2000 and reason == "unsafe_member" and "4096 bytes" in detail


def test_files_with_holes_are_refused_in_all_formats(tmp_path):
    old = bytearray(header("1.png", 512, b"S"))
    old[482] = 1
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    more = bytes(504) + b"\1" + bytes(7)
    holes = {"old": bytes(old) + 3 * more + bytes(512) + bytes(512),
             "0.1": pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}) + file("1.png", b"x"),
             "1.0": pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 20}) + file("1.png", b"x")}
    for name, members in holes.items():
        (tmp_path / "some.tar").write_bytes(GOOD + members + file("2.png", b"x") + END)
        keys, faults, _, _ = samples(tmp_path / "some.tar")
        assert (keys, faults.cut) == (["0", "2"], ""), name
        assert faults.members == [("1.png", "unsafe_member", "a file with holes")]


class EndlessMembers(io.RawIOBase):
    """A tar of very many empty members, made while it is read."""

    def __init__(self, names: Callable[[int], str], count: int) -> None:
        self.names, self.count, self.at = names, count, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset if whence == 0 else self.count * BLOCK + len(END)
        return self.at

    def read(self, size: int = -1) -> bytes:
        number = self.at // BLOCK
        self.at += size
        return header(self.names(number))[:size] if number < self.count else bytes(size)


@pytest.mark.parametrize(("names", "expected", "left_out"), [
    (lambda number: f"{number:09d}", 0, 5000), (lambda number: f"../{number:09d}.png", 0, 5000),
    (lambda number: f"{number:09d}.png", 5000, 0), (lambda number: f"0.{number:09d}", 1, 4000),
    (lambda number: "0.png", 5000, 0)], ids=["no samples", "unsafe", "samples", "one sample", "repeated"])
def test_very_many_small_members_take_bounded_memory(names, expected, left_out, monkeypatch):
    monkeypatch.setattr(foreign_samples, "MOST_NAMED", 100)
    faults = TarFaults()
    tracemalloc.start()
    count = sum(1 for _ in read_foreign_tar(EndlessMembers(names, 5000), faults))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == expected and not faults.cut and peak < 1 << 20
    assert len(faults.members) + faults.unnamed.total() == left_out
    if faults.unnamed:
        key, reason, detail = faults.remarks("some.tar")[-1]
        assert key == "some.tar" and reason in faults.unnamed and detail == f"{faults.unnamed[reason]} members more"


def test_members_that_are_too_large_are_named_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_samples, "MOST_SAMPLE_BYTES", 5000)
    monkeypatch.setattr(foreign_samples, "MOST_JSON_BYTES", 1000)
    (tmp_path / "some.tar").write_bytes(file("0.png", bytes(3000)) + file("0.json", bytes(1001)) + file(
        "0.txt", bytes(1001)) + file("0.npy", bytes(2001)) + file("0.cls", bytes(1000)) + file(
            "1.png", bytes(5001)) + END)
    faults = TarFaults()
    assert [set(sample) for sample in read_foreign_tar(tmp_path / "some.tar", faults)] == [{"__key__", "png", "cls"}]
    assert faults.members == [("0.json", "too_large", "1001 bytes"), ("0.txt", "too_large", "1001 bytes"),
                              ("0.npy", "too_large", "2001 bytes"), ("1.png", "too_large", "5001 bytes")]


def test_headers_for_the_search_have_no_negative_lengths(tmp_path):
    for field in (b"-0000001000\0", b"+0000001000\0", b" 0000001000\0", b"0000_001000\0", b"00000000008\0"):
        block = with_size_field(header(), field)
        assert parse_header(block[:257] + b"ustar\x0000" + block[265:]) is None
    assert parse_header(b"") is None and parse_header(bytes(300)) is None


def everything(read: Callable[[], Iterator[Any]]) -> tuple[list[Any], bool]:
    items: list[Any] = []
    try:
        items.extend(read())
    except (DamagedTar, tarfile.TarError):
        return items, True
    return items, False


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tar_format, tmp_path):
    path = tmp_path / "some.tar"
    names = ["a.png", f"{'long/' * 25}b.png", "żółć.png", "c/", f"{'y' * 96}.png", "d e.png"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += [f"{'z' * 300}.png", f"{'ż' * 300}.png"]
    with tarfile.open(path, "w", format=tar_format, pax_headers={"comment": "of the archive"}) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, 100 * number)
            info.mtime = 0.5 + number  # in a pax header
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE):
            info = tarfile.TarInfo(f"kind {kind.decode()}")
            info.type, info.linkname = kind, "l" * (200 if tar_format != tarfile.USTAR_FORMAT else 20)
            tar.addfile(info)
    data = path.read_bytes()
    members, damaged = everything(lambda: list_members(lambda offset, size: data[offset:offset + size], len(data)))
    with tarfile.open(path) as tar:
        expected = [(info.name, info.isreg(), info.offset_data, info.size) for info in tar]
    assert not damaged
    assert [(member.name, member.kind == "file", member.offset, member.size) for member in members] == expected
