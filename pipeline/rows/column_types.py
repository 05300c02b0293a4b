"""One type for each column, equal in all parts of a source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables.arrow_cells import kind_of_type, stored_columns
from pipeline.tables.cells import replace_surrogates


class ColumnTypes:
    """The type of each column that suits all its cells, whatever part they are in."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def add_row(self, cells: Mapping[str, Any]) -> None:
        """The cells of one more row."""
        for name, value in cells.items():
            self._kinds(name).add(_type_of(value))

    def add_schema(self, schema: pa.Schema, without: Collection[str] = (), text_columns: Collection[str] = ()) -> None:
        """The columns of one more parquet file, but those of `without`; `text_columns` hold bytes that are text."""
        for column in stored_columns(schema, without)[0]:
            if column.name not in without:
                kind = kind_of_type(column.type)
                self.add(column.name, "string" if kind == "bytes" and column.name in text_columns else kind)

    def add(self, name: str, kind: str) -> None:
        """One more type of a column: bool, int64, double, string or bytes."""
        self._kinds(name).add(kind)

    def merge(self, more: ColumnTypes) -> None:
        """The columns of another part."""
        for name, kinds in more._seen.items():
            self._kinds(name).update(kinds)

    def _kinds(self, name: str) -> set[str]:
        return self._seen.setdefault(replace_surrogates(name), set())

    def by_column(self) -> dict[str, str]:
        """Columns and their types, by the names that Arrow has for them."""
        return {name: _common(kinds - {"none"}) for name, kinds in sorted(self._seen.items())}


def _type_of(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool | float):
        return "bool" if isinstance(value, bool) else "double"
    if isinstance(value, int):
        # float64 has whole numbers up to 2**53.
        return "int64" if abs(value) <= 1 << 53 else "large" if -(1 << 63) <= value < 1 << 63 else "string"
    return "bytes" if isinstance(value, bytes) else "string"


def _common(kinds: set[str]) -> str:
    for wide, parts in (("bool", {"bool"}), ("int64", {"int64", "large"}), ("double", {"int64", "double"}),
                        ("bytes", {"bytes"})):
        if kinds and kinds <= parts:
            return wide
    return "string"


def text_to_numbers(column: pa.Array) -> pa.Array:
    """Texts as float64, null where a text is not a number."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    valid = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
    return pc.utf8_ltrim(pc.if_else(valid, text, None), "+").cast(pa.float64())
