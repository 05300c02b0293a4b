"""Classes that Hugging Face's `datasets` stores as numbers, with their names in the metadata of the schema."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def class_features(schema: pa.Schema) -> dict[str, Any]:
    """The features of the columns that hold classes, as `datasets` describes them; {} if the schema has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if '"ClassLabel"' in json.dumps(feature)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def name_classes(table: pa.Table, features: dict[str, Any]) -> pa.Table:
    """The table with names in place of the numbers of classes, also inside lists and structs.

    -1, which stands for no class, becomes null. A number without a name stays as a text of digits.
    """
    for number, field in enumerate(table.schema):
        if field.name in features:
            chunks = [_name_array(chunk, features[field.name]) for chunk in table.column(number).chunks]
            kind = _name_array(pa.array([], field.type), features[field.name]).type
            table = table.set_column(number, field.name, pa.chunked_array(chunks, kind))
    return table


def unnamed_classes(table: pa.Table, features: dict[str, Any]) -> dict[int, list[str]]:
    """A remark for each row with a class that has no name, by the number of the row."""
    remarks: dict[int, list[str]] = {}
    for name in features.keys() & set(table.schema.names):
        column, names = table.column(name), _names(features[name])
        if names is not None and pa.types.is_integer(column.type):
            for row in pc.indices_nonzero(pc.fill_null(_has_no_name(column, names), False)).to_pylist():
                remarks.setdefault(row, []).append(f"cell_changed: {name}: no name for the class {column[row]}")
    return remarks


def _has_no_name(numbers: pa.Array | pa.ChunkedArray, names: list[str]) -> Any:
    return pc.or_(pc.less(numbers, -1), pc.greater_equal(numbers, len(names)))


def _names(feature: Any) -> list[str] | None:
    """The names of a feature that is a class, None for other features."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _name_array(array: pa.Array, feature: Any) -> pa.Array:
    kind = array.type
    if (names := _names(feature)) is not None and pa.types.is_integer(kind):
        numbers = array.cast(pa.int64())
        named = pa.array(names, pa.string()).take(pc.if_else(
            pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names))), numbers, None))
        return pc.if_else(pc.fill_null(_has_no_name(numbers, names), False), numbers.cast(pa.string()), named)
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"feature": feature[0]}
    inner = feature.get("feature") if isinstance(feature, dict) else None
    if inner is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        whole = array.take(pa.array(range(len(array)), pa.int64()))  # without an offset, which offsets have too
        build = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        return build.from_arrays(whole.offsets, _name_array(whole.values, inner), mask=whole.is_null())
    if isinstance(feature, dict) and pa.types.is_struct(kind):
        # `datasets` stores a list of dicts as a dict of lists, whose features are those of the dicts.
        features = inner if isinstance(inner, dict) else feature
        fields = [_name_array(child, {"feature": features[part.name]} if inner is not None and part.name in features
                              else features.get(part.name)) for child, part in zip(array.flatten(), kind, strict=True)]
        return pa.StructArray.from_arrays(fields, [part.name for part in kind], mask=array.is_null())
    return array
