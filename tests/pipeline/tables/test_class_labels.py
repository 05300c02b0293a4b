"""Names of classes in the schema's metadata of `datasets`."""

import json
from decimal import Decimal

import pyarrow as pa
import pytest

from pipeline.tables.class_labels import class_features, name_classes

STYLES = {"names": ["Baroque", "Cubism"], "_type": "ClassLabel"}


def made_table(features: dict, columns: dict) -> pa.Table:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def test_classes_get_their_names_in_any_column():
    numbers = pa.array([None, [1, 0], [], [-1, 5]], pa.list_(pa.int64()))
    table = made_table(
        {"style": STYLES, "year": {"dtype": "int64", "_type": "Value"}, "tags": {"feature": STYLES, "_type": "List"},
         "old": [STYLES], "objects": {"feature": {"kind": STYLES, "box": [{"dtype": "int64"}]}, "_type": "Sequence"},
         "one": {"kind": STYLES}, "rows": {"feature": {"kind": STYLES}, "_type": "List"}},
        {"style": pa.array([1, 0, -1, None], pa.int8()), "year": [1, 2, 3, 4], "tags": numbers, "old": numbers,
         "objects": [{"kind": [1, 0], "box": [[1], [2]]}, None, {"kind": [], "box": []}, {"kind": None, "box": None}],
         "one": [{"kind": 1}, None, {"kind": None}, {"kind": 0}],
         "rows": [[{"kind": 0}, None], [], None, [{"kind": 1}]]})
    features = class_features(table.schema)
    for part in (table, table.slice(1, 2), table.take(pa.array([3, 1]))):
        rows = {row["year"]: row for row in name_classes(part, features)[0].to_pylist()}
        assert len(rows) == part.num_rows
        for year, row in rows.items():
            lists = [None, ["Cubism", "Baroque"], [], [None, "5"]][year - 1]
            assert row == {
                "year": year, "style": ["Cubism", "Baroque", None, None][year - 1], "tags": lists, "old": lists,
                "objects": [{"kind": ["Cubism", "Baroque"], "box": [[1], [2]]}, None, {"kind": [], "box": []},
                            {"kind": None, "box": None}][year - 1],
                "one": [{"kind": "Cubism"}, None, {"kind": None}, {"kind": "Baroque"}][year - 1],
                "rows": [[{"kind": "Baroque"}, None], [], None, [{"kind": "Cubism"}]][year - 1]}


def test_classes_without_a_name_stay_as_digits_and_are_named():
    table = made_table({"style": STYLES}, {"style": [1, 7, -3, None]})
    features = class_features(table.schema)
    named, remarks = name_classes(table, features)
    assert named.to_pydict() == {"style": ["Cubism", "7", "-3", None]}
    assert remarks == {1: ["cell_changed: style: no name for the class 7"],
                       2: ["cell_changed: style: no name for the class -3"]}


@pytest.mark.parametrize(("numbers", "texts"), [
    (pa.array([2**64 - 1, 1], pa.uint64()), ["18446744073709551615", "Cubism"]),
    (pa.array([2**60 + 1, -1]), ["1152921504606846977", None]), (pa.array([1e300, 0.0]), ["1e+300", "Baroque"])])
def test_numbers_that_no_class_can_have_are_texts(numbers, texts):
    table = made_table({"style": STYLES}, {"style": numbers})
    named, remarks = name_classes(table, class_features(table.schema))
    assert named["style"].to_pylist() == texts and list(remarks) == [0]


@pytest.mark.parametrize(("numbers", "texts"), [
    (pa.array(["1", "0", "-1", None]), ["Cubism", "Baroque", None, None]),
    (pa.array(["1.0", "Cubism", "Baroque"], pa.large_string()), ["Cubism", "Cubism", "Baroque"]),
    (pa.array(["1", "0", "1"]).dictionary_encode(), ["Cubism", "Baroque", "Cubism"]),
    (pa.array([True, False, None]), ["Cubism", "Baroque", None]),
    (pa.array([Decimal("1.00"), Decimal("0"), None]), ["Cubism", "Baroque", None])])
def test_numbers_of_classes_that_are_stored_as_other_types_get_their_names(numbers, texts):
    table = made_table({"style": STYLES}, {"style": numbers})
    named, remarks = name_classes(table, class_features(table.schema))
    assert named["style"].to_pylist() == texts and not remarks


@pytest.mark.parametrize(("numbers", "texts", "unnamed"), [
    (pa.array(["1", "7", None]), ["Cubism", "7", None], "7"), (pa.array(["0", "Dada"]), ["Baroque", "Dada"], "Dada"),
    (pa.array(["1", "007"]), ["Cubism", "007"], "007"),
    (pa.array([Decimal("1.00"), Decimal("1.50")]), ["Cubism", "1.50"], "1.50")])
def test_texts_and_decimals_that_no_class_has_are_named(numbers, texts, unnamed):
    table = made_table({"style": STYLES}, {"style": numbers})
    named, remarks = name_classes(table, class_features(table.schema))
    assert named["style"].to_pylist() == texts
    assert remarks == {1: [f"cell_changed: style: no name for the class {unnamed}"]}


def test_classes_in_lists_of_one_length_and_as_floats_get_their_names():
    pairs = [[0, 1], None, [1, 7], [None, -1]]
    columns = {"pair": pa.array(pairs, pa.list_(pa.int64(), 2)), "view": pa.array(pairs, pa.list_view(pa.int64())),
               "float": pa.array([1.0, None, 1.5, float("nan")]), "half": pa.array([0, None, 9, -1], pa.float16()),
               "in": [{"kind": [8, 8, 9]}, None, {"kind": []}, {"kind": [0]}], "tiny": pa.array([1, 0, None, 200],
                                                                                                pa.uint8())}
    features = {"pair": {"feature": STYLES, "length": 2, "_type": "Sequence"}, "view": [STYLES], "float": STYLES,
                "half": STYLES, "in": {"kind": [STYLES]}, "tiny": STYLES}
    table = made_table(features, columns)
    named, remarks = name_classes(table, class_features(table.schema))
    lists = [["Baroque", "Cubism"], None, ["Cubism", "7"], [None, None]]
    assert named.to_pydict() == {
        "pair": lists, "view": lists, "float": ["Cubism", None, "1.5", None], "half": ["Baroque", None, "9", None],
        "in": [{"kind": ["8", "8", "9"]}, None, {"kind": []}, {"kind": ["Baroque"]}],
        "tiny": ["Cubism", "Baroque", None, "200"]}
    assert {row: [remark.removeprefix("cell_changed: ") for remark in noted] for row, noted in remarks.items()} == {
        0: ["in: no name for the class 8, 9"], 3: ["tiny: no name for the class 200"],
        2: [f"{name}: no name for the class {number}" for name, number in (
            ("pair", 7), ("view", 7), ("float", 1.5), ("half", 9.0))]}


@pytest.mark.parametrize("metadata", [None, {"pandas": "{}"}, {"huggingface": "no json"}, {"huggingface": "[]"},
                                      {"huggingface": '{"info": {"features": [1]}}'},
                                      {"huggingface": '{"info": {"features": {"style": {"_type": "ClassLabel"}}}}'}])
def test_metadata_of_others_changes_nothing(metadata):
    table = pa.table({"style": [1, 0]}).replace_schema_metadata(metadata)
    features = class_features(table.schema)
    named, remarks = name_classes(table, features)
    assert named.equals(table) and not remarks
