"""The table in docs/reference/arrow-types.md, row by row, from a parquet file to the shard."""

import datetime
import decimal
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.tables.arrow_cells import as_utf8, table_rows
from pipeline.tables.parquet_tables import open_parquet
from tests.pipeline.shards.test_shard import ledger
from tests.pipeline.sources.list_datasets import PICTURES, shard_source, stored_samples

DOCUMENT = Path(__file__).parents[3] / "docs/reference/arrow-types.md"
DAY = datetime.date(2024, 2, 29)
NOON = datetime.datetime(2024, 2, 29, 12)


def extension(kind, storage):
    return pa.ExtensionArray.from_storage(kind, storage)


def microseconds(count, zone=None):
    return pa.array([count], pa.int64()).cast(pa.timestamp("us", zone))


CELLS = {
    "null": [None], "true": [True], "7": [7], "18446744073709551615": [2**64 - 1], "1.5": [1.5], "NaN": [math.nan],
    "infinity": [math.inf], "1.50": [decimal.Decimal("1.50")], "text": ["text"], "bytes of cc-by": [b"cc-by"],
    "bytes 00 FF": [b"\0\xff"], "2024-02-29": [DAY], "2024-02-29 12:00": [NOON], "[1, null]": [[1, None]],
    "01:02:03": [datetime.time(1, 2, 3)], "90 s": [datetime.timedelta(seconds=90)],
    "-1,500 ms": [datetime.timedelta(milliseconds=-1500)]}
TYPES = {
    "decimal32": pa.decimal32(5, 2), "decimal64": pa.decimal64(5, 2), "decimal128": pa.decimal128(5, 2),
    "decimal256": pa.decimal256(5, 2), "date32": pa.date32(), "date64": pa.date64(), "timestamp": pa.timestamp("us"),
    "time32": pa.time32("s"), "duration": pa.duration("ms"), "list": pa.list_(pa.int8()),
    "large_list": pa.large_list(pa.int8()), "list_view": pa.list_view(pa.int8()),
    "fixed_size_list": pa.list_(pa.int8(), 2), "bool": pa.bool_()}
ARRAYS = {
    ("string", "bytes 61 FF"): pa.array([b"a\xff"]).view(pa.string()),
    ("date32", "year 29349"): pa.array([10**7], pa.int32()).cast(pa.date32()),
    ("timestamp", "in Europe/Paris"): pa.array([NOON]).cast(pa.timestamp("us", "Europe/Paris")),
    ("timestamp", "in an unknown zone"): microseconds(int(NOON.replace(tzinfo=datetime.UTC).timestamp()) * 10**6,
                                                      "Mars/Phobos"),
    ("timestamp", "year 148108"): microseconds(2**62),
    ("time64", "01:02:03 and 1 ns"): pa.array([3723 * 10**9 + 1]).cast(pa.time64("ns")),
    ("map", "with keys of text"): pa.array([[("en", "a cat")]], pa.map_(pa.string(), pa.string())),
    ("map", "with other keys"): pa.array([[(1, "a cat")]], pa.map_(pa.int8(), pa.string())),
    ("struct", '{"en": "a cat", "raw": bytes FF}'): pa.array([{"en": "a cat", "raw": b"\xff"}]),
    ("struct", "an image: bytes FF D8, path a.jpg"): pa.array([{"bytes": b"\xff\xd8", "path": "a.jpg"}]),
    ("dictionary", "text"): pa.array(["text"]).dictionary_encode(),
    ("arrow.uuid", "16 bytes"): extension(pa.uuid(), pa.array([b"0123456789abcdef"], pa.binary(16))),
    ("arrow.json", '{"a": 1}'): extension(pa.json_(), pa.array(['{"a": 1}'])),
    ("arrow.bool8", "1"): extension(pa.bool8(), pa.array([1], pa.int8())),
    ("arrow.fixed_shape_tensor", "2 x 2"): extension(pa.fixed_shape_tensor(pa.int8(), [2, 2]),
                                                     pa.array([[1, 2, 3, 4]], pa.list_(pa.int8(), 4)))}


def array(name, cell):
    if (name, cell) in ARRAYS:
        return ARRAYS[name, cell]
    if name == "fixed_size_binary":
        return pa.array(CELLS[cell], pa.binary(len(CELLS[cell][0])))
    return pa.array(CELLS[cell], TYPES.get(name) or getattr(pa, name)())


def documented():
    """(name of a type, cell, stored type, stored cell, whether there is a warning) of each row of the document."""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("| `"):
            names, cell, kind, stored, warning = (part.strip() for part in line.strip("|").split(" | ", 4))
            for name in names.split(", "):
                yield name.strip("`"), cell, kind.strip("`"), stored.strip("`"), warning.strip(" |") == "yes"


def test_the_table_of_types_holds(tmp_path):
    rows = list(documented())
    assert len(rows) > 45
    columns = {f"c{number}": array(name, cell) for number, (name, cell, *_) in enumerate(rows)}
    table = pa.table({"image": [PICTURES["00.png"]], "caption": ["x"]} | columns)
    pq.write_table(table, tmp_path / "list.parquet")
    dataset, manifest = shard_source(tmp_path, tmp_path / "list.parquet")
    [sample] = stored_samples(dataset, manifest)
    [entry] = [file for file in manifest["items"][0]["files"] if file["name"].endswith(".parquet")]
    stored = pq.read_table(dataset.fetch("shards", entry))
    warned = Counter(line["detail"].split(":")[0] for line in ledger(dataset, manifest) if
                     line["reason"] == "cell_changed" and line["kept"])
    kinds = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), "string": pa.string(),
             "bytes": pa.binary()}
    for column, (name, cell, kind, text, warning) in zip(columns, rows, strict=True):
        what = f"{name}: {cell}"
        assert stored.schema.field(column).type == kinds[kind], what
        value = stored[column][0].as_py()
        assert value == (bytes.fromhex(text) if kind == "bytes" else json.loads(text)), what
        assert sample["json"].get(column) == (None if kind == "bytes" else value), what
        assert warned[column] == warning, what
    number = [cell for _, cell, *_ in rows].index("an image: bytes FF D8, path a.jpg")
    assert stored[f"c{number}_path"][0].as_py() == "a.jpg"


def test_cells_inside_of_lists_are_changed_and_named():
    expected = ['[{"d": "29349-01-26"}]', None, '[{"d": "1970-01-01"}, {"d": null}]']
    cells = [[], [{"d": 10**7}], None, [{"d": 0}, {"d": None}]]
    column = pa.array(cells, pa.list_(pa.struct([("d", pa.int32())]))).cast(
        pa.list_(pa.struct([("d", pa.date32())]))).slice(1)
    rows = table_rows(pa.table({"x": column}))
    assert [row.cells["x"] for row in rows] == expected
    assert [len(row.remarks) for row in rows] == [1, 0, 0] and "x: the date" in rows[0].remarks[0]


@pytest.mark.parametrize("kind", [pa.list_view(pa.int8()), pa.large_list_view(pa.int8()), pa.list_(pa.int8(), 2),
                                  pa.large_list(pa.int8())])
def test_lists_of_every_kind_beside_nulls_are_complete(kind):
    lists = [[1, 2], None, [3, None], [4, 5]]
    table = pa.table({"a": pa.array([[9, 9], *lists], kind)}).slice(1)
    assert [row.cells["a"] for row in table_rows(table)] == [each and json.dumps(each) for each in lists]
    assert [row.cells["a"] for row in table_rows(table, whole={"a"})] == lists


@pytest.mark.parametrize("indices", [pa.int8(), pa.int64()])
def test_categories_that_are_not_utf8_are_changed_and_named(tmp_path, indices):
    texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 3], np.int32)),
                                                   pa.py_buffer(b"a\xffb")])
    category = pa.DictionaryArray.from_arrays(pa.array([0, 1], indices), texts)
    nested = pa.StructArray.from_arrays([category, pa.array(["c", "d"])], ["a", "b"])
    pq.write_table(pa.table({"x": category, "y.z": category, "s": nested}), tmp_path / "a.parquet")
    with open_parquet(str(tmp_path / "a.parquet")) as file:
        rows = table_rows(file.read())
    assert rows[0].cells == {"x": "a\ufffd", "y.z": "a\ufffd", "s": '{"a": "a\ufffd", "b": "c"}'}
    assert [remark.partition(": bytes")[0] for remark in rows[0].remarks] == [
        f"cell_changed: {name}" for name in ("x", "y.z", "s")]
    assert rows[1].cells["x"] == "b" and not rows[1].remarks
    assert as_utf8(pa.table({"x": texts, "n": [1, 2]}), {"x", "n"}).to_pylist() == [
        {"x": "a\ufffd", "n": 1}, {"x": "b", "n": 2}]
