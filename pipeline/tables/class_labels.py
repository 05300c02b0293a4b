"""Classes that Hugging Face's `datasets` stores as numbers, with their names in the metadata of the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables.arrow_cells import is_text, with_offsets

_SHOWN = 5
"""So many numbers without a name are in a remark."""
_DIGITS = r"^-?[0-9]{1,18}(\.0+)?$"
"""Whole numbers as text, as CSV and pandas write them."""


def class_features(schema: pa.Schema) -> dict[str, Any]:
    """The features of the columns that hold classes, as `datasets` describes them; {} if the schema has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if '"ClassLabel"' in json.dumps(feature)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def name_classes(table: pa.Table, features: dict[str, Any]) -> tuple[pa.Table, dict[int, list[str]]]:
    """The table with names in place of the numbers of classes, also inside lists and structs; and remarks by row.

    Numbers may be stored as floats, decimals, texts of digits or bool. -1, which stands for no class, becomes null.
    A number without a name stays as a text of digits, with a remark.
    """
    remarks: dict[int, list[str]] = {}
    for number, field in enumerate(table.schema):
        if field.name not in features:
            continue
        feature, column, has_unnamed = features[field.name], table.column(number), [False]
        chunks = [_name_array(chunk, feature, has_unnamed) for chunk in column.chunks]
        kind = _name_array(pa.array([], field.type), feature, has_unnamed).type
        table = table.set_column(number, field.name, pa.chunked_array(chunks, kind))
        for row, value in enumerate(column.to_pylist()) if has_unnamed[0] else ():
            if unnamed := list(dict.fromkeys(map(str, _unnamed_in(value, feature)))):
                remarks.setdefault(row, []).append(f"cell_changed: {field.name}: no name for the class "
                                                   f"{', '.join(unnamed[:_SHOWN])}")
    return table, remarks


def _names(feature: Any) -> list[str] | None:
    """The names of a feature that is a class, None for other features."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _inner_feature(feature: Any) -> Any:
    """The feature of the elements of a list, None if it is no list."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if isinstance(feature, dict) else None


def _field_features(feature: Any, names: Iterable[str]) -> list[Any]:
    """The features of the fields of a struct. `datasets` stores a list of dicts as a dict of lists."""
    inner = _inner_feature(feature)
    if isinstance(inner, dict) and not (isinstance(feature, dict) and "feature" in names):
        return [{"feature": inner[name]} if name in inner else None for name in names]
    return [feature.get(name) if isinstance(feature, dict) else None for name in names]


def _unnamed_in(value: Any, feature: Any) -> Iterator[Any]:
    """The numbers and texts in a cell that no class has."""
    if (names := _names(feature)) is not None:
        number = value
        if isinstance(value, str) and value not in names and re.match(_DIGITS, value):
            number = int(value.partition(".")[0])
        if isinstance(value, str | int | float | Decimal) and value == value and number not in {
                -1, *range(len(names)), *names}:
            yield value
    elif isinstance(value, list):
        for each in value:
            yield from _unnamed_in(each, _inner_feature(feature))
    elif isinstance(value, dict):
        for each, inner in zip(value.values(), _field_features(feature, list(value)), strict=True):
            yield from _unnamed_in(each, inner)


def _name_array(array: pa.Array, feature: Any, has_unnamed: list[bool]) -> pa.Array:
    """An array with names in place of numbers. `has_unnamed` becomes [True] if a number has no name."""
    names = _names(feature)
    if names is not None and pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if names is not None and is_text(kind):
        return _name_texts(array.cast(pa.large_string()), names, has_unnamed)
    if names is not None and pa.types.is_boolean(kind):
        return _name_array(array.cast(pa.int8()), feature, has_unnamed)
    if names is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        if pa.types.is_floating(kind):  # pandas makes floats of integers beside nulls
            array = array.cast(pa.float64())
        size = array.cast(pa.float64(), safe=False)
        is_whole = pc.fill_null(pc.and_(pc.less(pc.abs(size), 2.0**53), pc.equal(pc.floor(size), size)), False)
        numbers = pc.if_else(is_whole, array, None).cast(pa.int64())
        named = pa.array(names, pa.string()).take(pc.if_else(
            pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names))), numbers, None))
        texts = pc.if_else(pc.is_null(array, nan_is_null=True), None, pc.if_else(
            is_whole, numbers.cast(pa.string()), array.cast(pa.string())))
        is_named = pc.or_(pc.is_valid(named), pc.fill_null(pc.equal(numbers, -1), False))
        has_unnamed[0] |= pc.any(pc.and_(pc.invert(is_named), pc.is_valid(texts))).as_py() or False
        return pc.if_else(is_named, named, texts)
    inner = _inner_feature(feature)
    if inner is not None:
        array = with_offsets(array)
        kind = array.type
    if inner is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        whole = array.take(pa.array(range(len(array)), pa.int64()))  # without an offset, which offsets have too
        build = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        return build.from_arrays(whole.offsets, _name_array(whole.values, inner, has_unnamed), mask=whole.is_null())
    if isinstance(feature, dict) and pa.types.is_struct(kind):
        names = [part.name for part in kind]
        fields = [_name_array(child, part, has_unnamed) for child, part in zip(
            array.flatten(), _field_features(feature, names), strict=True)]
        return pa.StructArray.from_arrays(fields, names, mask=array.is_null())
    return array


def _name_texts(array: pa.Array, names: list[str], has_unnamed: list[bool]) -> pa.Array:
    """Names in place of texts of digits. A text that is a name itself stays, and so does any other text."""
    is_name = pc.is_in(array, pa.array(names, pa.large_string()))
    is_number = pc.and_(pc.match_substring_regex(array, _DIGITS), pc.invert(is_name))
    digits = pc.if_else(is_number, pc.replace_substring_regex(array, r"\..*", ""), None)
    named = _name_array(digits.cast(pa.int64()), {"_type": "ClassLabel", "names": names}, has_unnamed)
    is_named = pc.and_(is_number, pc.or_(pc.is_null(named), pc.is_in(named, pa.array(names, pa.string()))))
    has_unnamed[0] |= pc.any(pc.invert(pc.or_(is_name, is_named))).as_py() or False
    return pc.if_else(pc.fill_null(is_named, False), named, array.cast(pa.string()))
