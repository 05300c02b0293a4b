"""Cells of any type as plain cells, which JSON and parquet can hold."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_LETTERS = 16 << 20
"""Of one text. A shard has the texts of all its rows in memory, and a compressed file of 1 MB may hold 1 GB of text."""
_LEVELS = 64  # Arrow ends the process at some hundreds
_FIRST_KEYS = ("en", "text", "caption", "raw", "value")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_INFINITIES = {float("inf"), float("-inf")}
_MAY_BE_INFINITE = re.compile(r"Infinity|[eE]\+?\d{3}|\d{309}")


@dataclasses.dataclass(slots=True)
class TableRow:
    """One row of a file, or the reason why it cannot be read."""

    cells: dict[str, Any]
    remarks: Sequence[str] = ()
    """Entries for the ledger, as `reason: detail`."""
    place: str = ""
    """File and row, if the row cannot be read."""
    problem: str = ""
    """Why the row cannot be read. It has no cells then."""


def json_cell(value: Any) -> Any:
    """A plain cell. NaN and infinity, which JSON does not have, become None; lists and objects become JSON text."""
    if isinstance(value, str):
        return value if value.isascii() else replace_surrogates(value)
    if isinstance(value, float):
        return None if value != value or value in _INFINITIES else value
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, list | tuple | dict):
        return json_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_bytes(bytes(value))
    return replace_surrogates(str(value))


def decode_bytes(data: bytes) -> str | bytes:
    """Bytes as text if they are UTF-8 without NUL, otherwise as they are."""
    try:
        return data if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return data


def stored_text(value: Any) -> str:
    """A plain cell as text, for a column of several types. Bytes become base64, bool is spelled as in JSON."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value).lower() if isinstance(value, bool) else str(value)


def json_text(value: Any) -> str:
    """Lists and objects as JSON. Bytes inside become text, or base64 if they are not UTF-8."""
    return replace_surrogates(json.dumps(_json_value(value), ensure_ascii=False))


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else stored_text(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each) for each in value]
    cell = json_cell(value)
    return stored_text(cell) if isinstance(cell, bytes) else cell


def replace_surrogates(string: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as in cut emoji, become question marks."""
    return string if string.isascii() else string.encode("utf-8", "replace").decode()


def cell_text(value: Any) -> str:
    """A cell as one text. None is the empty text; a list counts by its first text, an object by its best-known key."""
    if isinstance(value, str):
        return value if value.isascii() else replace_surrogates(value)
    value = first_value(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    cell = json_cell(value)
    return "" if cell is None else stored_text(cell)


def first_value(value: Any) -> Any:
    """The first value that is not empty in nested lists and objects. Keys such as `en` and `text` come first."""
    if isinstance(value, dict):
        keys = [*(key for key in _FIRST_KEYS if key in value), *value]
        value = [value[key] for key in keys]
    if isinstance(value, list | tuple):
        return next((first for first in map(first_value, value) if first not in (None, "")), None)
    return value


def decode_text(data: bytes, column: str) -> tuple[str, list[str]]:
    """The text of a file, and a remark if its bytes are not UTF-8; these become U+FFFD. "" if it is too long."""
    if len(data) > MOST_LETTERS:
        return "", [_too_long(column, len(data))]
    try:
        return data.decode("utf-8-sig").strip(), []
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "replace").strip(), [f"cell_changed: {column}: bytes that are not UTF-8"]


def leave_out_long_texts(cells: dict[str, Any]) -> list[str]:
    """Make texts that are too long None, and return remarks on them."""
    long_texts = {name: len(cell) for name, cell in cells.items() if isinstance(cell, str) and len(cell) > MOST_LETTERS}
    cells |= dict.fromkeys(long_texts)
    return [_too_long(name, length) for name, length in long_texts.items()]


def _too_long(column: str, length: int) -> str:
    return f"cell_changed: {column}: left out, for it has {length:,} letters, and at most {MOST_LETTERS:,} are stored"


class JsonDecoder:
    """Decodes JSON and keeps what is lost by that, for the ledger."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._repeated: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        cells = dict(pairs)
        if len(cells) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            self._repeated += [name for name, count in counts.items() if count > 1]
        return cells

    def parse_row(self, text: str) -> dict[str, Any]:
        """A text as a row; ValueError if it is no object, or has more than 64 levels of brackets."""
        try:
            return check_json_row(self.decode(text), text)
        except RecursionError:
            raise ValueError(f"more than {_LEVELS} levels of brackets") from None

    def take_remarks(self, cells: Mapping[str, Any], text: str) -> list[str]:
        """Remarks on a row since the last call: names that an object has twice, halves of characters, infinity."""
        remarks = [f"cell_changed: {replace_surrogates(name)}: an object has it several times; the last one counts"
                   for name in self._repeated]
        self._repeated.clear()
        if _HALF_CHARACTER.search(text):
            for name, cell in cells.items():
                text_of_cell = json.dumps({name: cell}, ensure_ascii=False)
                if replace_surrogates(text_of_cell) != text_of_cell:
                    remarks.append(f"cell_changed: {replace_surrogates(name)}: halves of characters")
        if _MAY_BE_INFINITE.search(text):
            remarks += [f"cell_changed: {replace_surrogates(name)}: infinity is stored as null"
                        for name, cell in cells.items() if _has_infinity(cell)]
        return remarks


def check_json_row(row: Any, text: str) -> dict[str, Any]:
    """The row itself; ValueError if it is no object, or has too many levels for Arrow."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if text.count("[") + text.count("{") > _LEVELS and _has_level(row, _LEVELS):
        raise ValueError(f"more than {_LEVELS} levels of brackets")
    return row


def _has_infinity(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_infinity, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value in _INFINITIES


def _has_level(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_has_level(each, levels - 1) for each in (
        value.values() if isinstance(value, dict) else value))


def unique_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names, remarks): a name that came before gets a number, as in `caption_2`."""
    wanted = list(names)
    given: dict[str, None] = {}
    remarks = []
    for name in wanted:
        other, number = name, 2
        while other in given or (other != name and other in wanted):
            other, number = f"{name}_{number}", number + 1
        if other != name:
            remarks.append(f"repeated_column: {name} is stored as {other}")
        given[other] = None
    return list(given), remarks
