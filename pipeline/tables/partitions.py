"""Columns in the names of folders, as Hive, Spark and pyarrow write them: `lang=en/year=2024/part-0.parquet`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import unquote

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_texts(path: str) -> dict[str, str | None]:
    """The columns in a path below a source: names and texts, None for Hive's null."""
    found: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        name, sign, value = part.partition("=")
        if sign and name:
            found[unquote(name)] = None if value == _NULL else unquote(value)
    return found


def partition_types(paths: Iterable[str]) -> dict[str, str]:
    """The type of each column in paths: int64 if all values are whole numbers of 64 bits, otherwise string."""
    types: dict[str, str] = {}
    for path in paths:
        for name, text in partition_texts(path).items():
            is_number = text is None or _is_int64(text)
            types[name] = "int64" if is_number and types.get(name, "int64") == "int64" else "string"
    return types


def partition_cells(path: str, types: Mapping[str, str]) -> dict[str, int | str | None]:
    """The cells that a path gives to each row of its file."""
    return {name: int(text) if text is not None and types[name] == "int64" else text
            for name, text in partition_texts(path).items()}


def _is_int64(text: str) -> bool:
    digits = text.removeprefix("-")
    return (digits.isascii() and digits.isdigit() and str(int(text[:20])) == text
            and -(1 << 63) <= int(text) < 1 << 63)
