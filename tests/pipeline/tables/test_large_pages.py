"""Columns that are read page by page have the values that pyarrow reads, in bounded memory."""

import itertools
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.tables import large_pages, snappy_stream

ROWS = 120


def values(rng: np.random.Generator) -> list[bytes | None]:
    """Values that compress well or badly, repeated and empty values, and nulls."""
    choices = [rng.bytes(int(rng.integers(0, 300))) for _ in range(ROWS // 3)]
    choices += [bytes(rng.integers(0, 3, int(rng.integers(0, 2000))).astype(np.uint8)) for _ in range(5)]
    choices += [b"x" * int(rng.integers(0, 9000)) for _ in range(3)]
    return [None if rng.random() < 0.1 else choices[int(rng.integers(len(choices)))] for _ in range(ROWS)]


def columns(rng: np.random.Generator) -> pa.Table:
    path = [None if number % 7 == 0 else f"{number}.png" for number in range(ROWS)]
    structs = [None if number % 11 == 0 else {"bytes": data, "path": name, "more": {"x": number}}
               for number, (data, name) in enumerate(zip(values(rng), path, strict=True))]
    alone = [None if data is None or number % 5 == 0 else {"bytes": data} for number, data in enumerate(values(rng))]
    solid = [b"" if data is None else data for data in values(rng)]
    return pa.table({
        "a_b": list(range(ROWS)), "image": pa.array(structs), "alone": pa.array(alone),
        "jpg": pa.array(values(rng), pa.large_binary()), "solid": pa.array(solid, pa.binary()),
        "text": path, "list": [[number] for number in range(ROWS)]},
    ).cast(pa.schema([pa.field("a_b", pa.int64()), *(pa.field(name, kind, name != "solid") for name, kind in (
        ("image", pa.array(structs).type), ("alone", pa.array(alone).type), ("jpg", pa.large_binary()),
        ("solid", pa.binary()), ("text", pa.string()), ("list", pa.list_(pa.int64()))))]))


def read(path, group: int, start: int, stop: int, size: int = 64) -> pa.Table:
    with pq.ParquetFile(path) as file:
        batches = large_pages.group_batches(file, str(path), group, size, start, stop, str(path.parent))
        return pa.Table.from_batches(list(batches), file.schema_arrow)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
def test_values_are_those_that_pyarrow_reads(tmp_path, monkeypatch, compression, version):
    monkeypatch.setattr(large_pages, "LARGE_PAGE_BYTES", 1000)
    monkeypatch.setattr(large_pages, "_MOST_RATIO", 1e9)
    table = columns(np.random.default_rng(0))
    for number, (dictionary, page_size) in enumerate(itertools.product((True, False, ["jpg"]), (1 << 10, 1 << 30))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path, compression=compression, data_page_version=version, use_dictionary=dictionary,
                       row_group_size=80, data_page_size=page_size, write_batch_size=16 if page_size < 5000 else 1024,
                       dictionary_pagesize_limit=page_size * 20)
        with open(path, "rb") as stream:
            large = large_pages._large_columns(pq.ParquetFile(stream), stream, 0)
        assert page_size < 5000 or large.keys() == {"image", "alone", "jpg", "solid"}
        for group, start, stop in ((0, 0, 80), (0, 37, 61), (1, 39, 40), (0, 79, 80), (1, 0, 1), (1, 5, 5)):
            rows = read(path, group, start, stop)
            assert rows.slice(start, stop - start).equals(table.slice(group * 80 + start, stop - start)), path


def test_large_columns_are_read_in_batches_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(large_pages, "LARGE_PAGE_BYTES", 1000)
    rng = np.random.default_rng(1)
    table = pa.table({"jpg": [rng.bytes(500) for _ in range(90)]})
    pq.write_table(table, tmp_path / "alone.parquet")
    for size in (1, 7, 64, 1000):
        assert read(tmp_path / "alone.parquet", 0, 0, 90, size).equals(table)


def test_damaged_snappy_is_refused():
    content = b"abcd" * 1000 + bytes(range(256)) * 300 + np.random.default_rng(0).bytes(3_000_000) + b"x" * 2_000_000
    block = pa.Codec("snappy").compress(content, asbytes=True)
    assert b"".join(snappy_stream.decompress_snappy(reader(block))) == content
    block = pa.Codec("snappy").compress(content[:80_000], asbytes=True)
    for number in range(0, len(block), 7):
        for damaged in (block[:number], block[:number] + b"\xff" + block[number + 1:]):
            try:
                damaged_content = b"".join(snappy_stream.decompress_snappy(reader(damaged)))
            except snappy_stream.DamagedBlock:
                continue
            assert len(damaged_content) <= 1 << 27


def reader(data: bytes):
    rest = iter([data])
    return lambda count: next(rest, b"")


def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(large_pages, "LARGE_PAGE_BYTES", 1000)
    rng = np.random.default_rng(3)
    table = pa.table({"jpg": [None if number % 9 == 0 else rng.bytes(60) for number in range(90)], "x": range(90)})
    path = tmp_path / "damaged.parquet"
    for dictionary, version in itertools.product((True, False), ("1.0", "2.0")):
        pq.write_table(table, path, use_dictionary=dictionary, data_page_version=version)
        whole, refused = path.read_bytes(), 0
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        for position in [*range(4, 120), *rng.integers(4, footer, 150).tolist()]:
            path.write_bytes(whole[:position] + rng.bytes(1) + whole[position + 1:])
            try:
                assert read(path, 0, 0, 90).num_rows == 90
            except (pa.ArrowException, OSError):  # of which open_parquet makes sentences
                refused += 1
        assert refused > 10


MEASURE = """
import sys
import pyarrow.parquet as pq
from pipeline.tables.large_pages import group_batches

file = pq.ParquetFile(sys.argv[1], buffer_size=1 << 20, pre_buffer=False)
print(sum(len(row["image"]["bytes"]) for batch in group_batches(file, sys.argv[1], 0, 64, 0, 400, sys.argv[2])
          for row in batch.to_pylist()))
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_row_group_in_one_page_takes_little_memory(tmp_path):
    rng = np.random.default_rng(2)
    images = [{"bytes": rng.bytes(500_000), "path": None} for _ in range(400)]
    pq.write_table(pa.table({"image": images, "style": [1] * 400}), tmp_path / "large.parquet")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "large.parquet"), str(tmp_path)],
                          capture_output=True, text=True, check=True)
    length, peak = map(int, done.stdout.split())
    assert length == 400 * 500_000 and peak < 250, peak  # pyarrow alone: 560
