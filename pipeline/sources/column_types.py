"""One type for each column, equal in all parts of a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.sources.rows import replace_surrogates


class ColumnTypes:
    """The type of each column that suits all its cells, whatever part they are in."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def see(self, cells: Mapping[str, Any]) -> None:
        """The cells of one more row."""
        for name, value in cells.items():
            self._of(name).add(_type_of(value))

    def see_schema(self, schema: pa.Schema) -> None:
        """The columns of one more file of parquet."""
        for field_ in schema:
            kind = field_.type.value_type if pa.types.is_dictionary(field_.type) else field_.type
            # As `plain` and JSON have them: 64 bits without a sign become text.
            found = ("none" if pa.types.is_null(kind) else "bool" if pa.types.is_boolean(kind) else
                     "double" if pa.types.is_floating(kind) else
                     "int64" if pa.types.is_integer(kind) and kind != pa.uint64() else "string")
            self._of(field_.name).add(found)

    def _of(self, name: str) -> set[str]:
        return self._seen.setdefault(replace_surrogates(name), set())

    def found(self) -> dict[str, str]:
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
    return "string"


def _common(kinds: set[str]) -> str:
    for wide, parts in (("bool", {"bool"}), ("int64", {"int64", "large"}), ("double", {"int64", "double"})):
        if kinds and kinds <= parts:
            return wide
    return "string"
