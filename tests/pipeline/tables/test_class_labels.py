"""Names of classes in the schema's metadata of `datasets`."""

import json

import pyarrow as pa
import pytest

from pipeline.tables.class_labels import class_features, name_classes, unnamed_classes

STYLES = {"names": ["Baroque", "Cubism"], "_type": "ClassLabel"}


def made_table(features: dict, columns: dict) -> pa.Table:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def test_classes_get_their_names_wherever_they_are():
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
        rows = {row["year"]: row for row in name_classes(part, features).to_pylist()}
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
    assert name_classes(table, features).to_pydict() == {"style": ["Cubism", "7", "-3", None]}
    assert unnamed_classes(table, features) == {1: ["cell_changed: style: no name for the class 7"],
                                                2: ["cell_changed: style: no name for the class -3"]}


@pytest.mark.parametrize("metadata", [None, {"pandas": "{}"}, {"huggingface": "no json"}, {"huggingface": "[]"},
                                      {"huggingface": '{"info": {"features": [1]}}'},
                                      {"huggingface": '{"info": {"features": {"style": {"_type": "ClassLabel"}}}}'}])
def test_metadata_of_others_changes_nothing(metadata):
    table = pa.table({"style": [1, 0]}).replace_schema_metadata(metadata)
    features = class_features(table.schema)
    assert name_classes(table, features).equals(table) and unnamed_classes(table, features) == {}
