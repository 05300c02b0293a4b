"""Columns of Arrow as plain cells. docs/reference/arrow-types.md has the table of types."""

from __future__ import annotations

import bisect
import math
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables.cells import TableRow, decode_bytes, json_text, unique_names

Problems = dict[int, str]
"""Changes of cells, by the number of the row."""
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def kind_of_type(kind: pa.DataType) -> str:
    """none, bool, int64, double, string or bytes: how a column is stored. Bytes are `string` where they are text."""
    kind = storage_type(kind)
    if pa.types.is_null(kind):
        return "none"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_floating(kind):
        return "double"
    if pa.types.is_integer(kind) and kind != pa.uint64():  # JSON and Arrow have no type for it and negative numbers
        return "int64"
    return "bytes" if is_binary(kind) else "string"


def storage_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary, of runs or of an extension."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return storage_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name in {"arrow.uuid", "arrow.bool8"}:
            return pa.string() if kind.extension_name == "arrow.uuid" else pa.bool_()
        return storage_type(kind.storage_type)
    return kind


def is_binary(kind: pa.DataType) -> bool:
    """Whether cells are bytes."""
    return (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
            or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether cells are text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_nested(kind: pa.DataType) -> bool:
    """Whether cells are lists, objects or maps."""
    return pa.types.is_nested(storage_type(kind))


def is_image_struct(kind: pa.DataType) -> bool:
    """Whether cells are images as `datasets` stores them: bytes, and perhaps a path."""
    kind = storage_type(kind)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return {field.name for field in kind} <= {"bytes", "path"} and is_binary(storage_type(kind.field("bytes").type))


@dataclass(frozen=True)
class StoredColumn:
    """A column as it is stored, and where its cells are."""

    name: str
    position: int
    """Its place among the columns of the table."""
    type: pa.DataType
    field: str = ""
    """bytes or path of a column of images, which is stored as two columns."""


def stored_columns(schema: pa.Schema, whole: Collection[str] = ()) -> tuple[list[StoredColumn], list[str]]:
    """The columns with unique names in UTF-8, and a remark on each repeated name.

    A column of images becomes bytes, and `<name>_path` if it has paths; not those of `whole`.
    """
    names, remarks = unique_names([_utf8(name) for name in schema.names])
    columns = []
    for position, (name, kind) in enumerate(zip(names, schema.types, strict=True)):
        if name in whole or not is_image_struct(kind):
            columns.append(StoredColumn(name, position, kind))
            continue
        for field in sorted(field.name for field in storage_type(kind)):
            columns.append(StoredColumn(name if field == "bytes" else f"{name}_path", position,
                                        storage_type(kind).field(field).type, field))
    unique = unique_names([column.name for column in columns])[0]
    return [replace(column, name=name) for column, name in zip(columns, unique, strict=True)], remarks


def table_rows(table: pa.Table, text_columns: Collection[str] = (), whole: Collection[str] = ()) -> list[TableRow]:
    """The rows of a table with plain cells.

    text_columns: columns of bytes that are text. whole: columns whose lists, objects and bytes stay as Python has them.
    """
    columns = stored_columns(table.schema, whole)[0]
    cells, problems = [], []
    for column in columns:
        data = table.column(column.position)
        if column.name in whole:
            values, changed = python_cells(data)
        else:
            values, changed = plain_cells(pc.struct_field(_decode(data), column.field) if column.field else data,
                                          as_bytes=column.name not in text_columns)
        cells.append(values)
        problems.append(changed)
    names = [column.name for column in columns]
    rows = [TableRow(dict(zip(names, row, strict=True))) for row in zip(*cells, strict=True)]
    for name, changed in zip(names, problems, strict=True):
        for number, problem in changed.items():
            rows[number].remarks = [*rows[number].remarks, f"cell_changed: {name}: {problem}"]
    return rows


def text_columns(table: pa.Table) -> set[str]:
    """The stored columns of bytes that are text in all their cells, without those of nulls only."""
    found = set()
    for column in stored_columns(table.schema)[0]:
        if not column.field and kind_of_type(column.type) == "bytes":
            cells = [cell for cell in plain_cells(table.column(column.position), as_bytes=True)[0] if cell is not None]
            if cells and all(isinstance(decode_bytes(cell), str) for cell in cells):
                found.add(column.name)
    return found


def as_utf8(table: pa.Table, names: Collection[str]) -> pa.Table:
    """A table with U+FFFD for bytes in some columns that are not UTF-8, which functions of Arrow refuse."""
    for position, field in enumerate(table.schema):
        if field.name in names and is_text(field.type):
            try:
                table.column(position).validate(full=True)
            except pa.ArrowInvalid:
                cells = pa.array(plain_cells(table.column(position))[0], field.type)
                table = table.set_column(position, field, cells)
    return table


def plain_cells(column: pa.ChunkedArray, *, as_bytes: bool = False) -> tuple[list[Any], Problems]:
    """The cells of a column as plain cells. Lists, objects and maps become JSON text."""
    decoded = _decode(column)
    if not pa.types.is_nested(decoded.type):
        return _join(_leaves(array, as_bytes) for array in decoded.chunks)
    cells, problems = _join(map(_nested, decoded.chunks))
    return [None if value is None else json_text(value) for value in cells], problems


def python_cells(column: pa.ChunkedArray) -> tuple[list[Any], Problems]:
    """The cells of a column with lists, objects and bytes as Python has them; all others as plain cells."""
    return _join(map(_nested, _decode(column).chunks))


def _join(pieces: Iterable[tuple[list[Any], Problems]]) -> tuple[list[Any], Problems]:
    cells: list[Any] = []
    problems: Problems = {}
    for values, changed in pieces:
        problems |= {number + len(cells): problem for number, problem in changed.items()}
        cells += values
    return cells, problems


def _decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionaries, runs and extensions at its top."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        stored = pa.chunked_array([array.storage for array in column.chunks], kind.storage_type)
        if kind.extension_name == "arrow.uuid":
            return pa.chunked_array([pa.array([None if data is None else str(uuid.UUID(bytes=data))
                                               for data in stored.to_pylist()], pa.string())])
        return stored.cast(pa.bool_()) if kind.extension_name == "arrow.bool8" else _decode(stored)
    if pa.types.is_dictionary(kind):
        return _decode(column.cast(kind.value_type))
    return _decode(pc.run_end_decode(column)) if pa.types.is_run_end_encoded(kind) else column


def _nested(array: pa.Array) -> tuple[list[Any], Problems]:
    """Lists, objects and maps as Python has them, with plain cells and bytes inside. A map of texts is an object."""
    kind = array.type
    if kind != storage_type(kind):
        array = pa.concat_arrays(_decode(pa.chunked_array([array])).chunks)
        kind = array.type
    if pa.types.is_struct(kind):
        fields = [_nested(child) for child in array.flatten()]
        names = unique_names([_utf8(field.name) for field in kind])[0]
        rows = zip(*(cells for cells, _ in fields), strict=True) if fields else [()] * len(array)
        values = [dict(zip(names, row, strict=True)) if valid else None
                  for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
        return values, {row: problem for _, problems in fields for row, problem in problems.items()}
    if pa.types.is_map(kind):
        keys, key_problems = _nested(array.keys)
        items, problems = _nested(array.items)
        pairs = list(zip(keys, items, strict=True))
        maps, problems = _slices(array, pairs, key_problems | problems)
        return [_object(each) for each in maps], problems
    array = with_offsets(array)
    if pa.types.is_nested(kind):
        return _slices(array, *_nested(array.values))
    return _leaves(array, as_bytes=True)


def with_offsets(array: pa.Array) -> pa.Array:
    """An array of lists, also of lists of a fixed size and of views, as lists with offsets."""
    kind = array.type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)):
        return array
    # The cast of pyarrow 26 loses the last list of views that have nulls.
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0))
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    return pa.LargeListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())


def _slices(array: pa.Array, values: list[Any], problems: Problems) -> tuple[list[Any], Problems]:
    """The lists of an array of lists, given the cells of all of them."""
    offsets = array.offsets.to_pylist()
    lists = [values[start:stop] if valid else None for start, stop, valid in
             zip(offsets, offsets[1:], array.is_valid().to_pylist(), strict=False)]
    inside = {number: problem for number, problem in problems.items() if offsets[0] <= number < offsets[-1]}
    return lists, {bisect.bisect_right(offsets, number) - 1: problem for number, problem in inside.items()}


def _object(pairs: list[Any] | None) -> Any:
    if pairs is None:
        return None
    if all(isinstance(key, str) for key, _ in pairs) and len({key for key, _ in pairs}) == len(pairs):
        return dict(pairs)
    return [list(pair) for pair in pairs]


def _leaves(array: pa.Array, as_bytes: bool) -> tuple[list[Any], Problems]:
    """The cells of an array that has no lists and objects."""
    kind = array.type
    if is_binary(kind):
        return (array.to_pylist(), {}) if as_bytes else _texts(array)
    if is_text(kind):
        try:
            return array.to_pylist(), {}
        except UnicodeDecodeError:
            return _texts(array.cast(pa.large_binary()))
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return array.to_pylist(), {}
    if kind == pa.uint64() or (pa.types.is_time64(kind) and kind.unit == "ns"):  # Python's times have microseconds
        return array.cast(pa.string()).to_pylist(), {}
    if pa.types.is_integer(kind):
        return array.to_pylist(), {}
    if pa.types.is_floating(kind):
        values = array.to_pylist()
        cells = [value if value is not None and math.isfinite(value) else None for value in values]
        return cells, {row: "infinity is stored as null" for row, value in enumerate(values)
                       if value is not None and math.isinf(value)}
    if pa.types.is_duration(kind):
        return [_duration(count, _UNITS[kind.unit]) for count in array.cast(pa.int64()).to_pylist()], {}
    try:
        return [None if value is None else str(value) for value in array.to_pylist()], {}
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        return _one_by_one(array)


def _one_by_one(array: pa.Array) -> tuple[list[Any], Problems]:
    """Dates and times as text; those that Python does not have as Arrow writes them, or null."""
    cells: list[Any] = []
    problems: Problems = {}
    kind = array.type
    for row, scalar in enumerate(array):
        try:
            value = scalar.as_py()
            cells.append(None if value is None else str(value))
        except (ValueError, OverflowError, LookupError, pa.ArrowException):
            zone = kind.tz if pa.types.is_timestamp(kind) else None
            naive = pa.array([scalar.value], pa.int64()).cast(pa.timestamp(kind.unit)) if zone else array[row:row + 1]
            text = naive.cast(pa.string())[0].as_py()
            cells.append(None if text.startswith("<") else f"{text}Z" if zone else text)
            problems[row] = ("the date is stored as null: it is too far away" if text.startswith("<") else
                             f"the time is stored in UTC: its year or its zone {zone} is unknown" if zone else
                             "the date is stored as text: its year is not one of 1 to 9999")
    return cells, problems


def _texts(array: pa.Array) -> tuple[list[str | None], Problems]:
    """Bytes as text. Bytes that are not UTF-8 become U+FFFD."""
    cells: list[str | None] = []
    problems: Problems = {}
    for row, data in enumerate(array.to_pylist()):
        text = None if data is None else data.decode("utf-8", "replace")
        if text is not None and "\ufffd" in text and text.encode() != data:
            problems[row] = "bytes that are not UTF-8"
        cells.append(text)
    return cells, problems


def _duration(count: int | None, per_second: int) -> str | None:
    """A duration as ISO 8601 has it, in seconds, as in PT1.5S."""
    if count is None:
        return None
    seconds, rest = divmod(abs(count), per_second)
    digits = f".{rest:0{len(str(per_second)) - 1}d}".rstrip("0") if rest else ""
    return f"{'-' if count < 0 else ''}PT{seconds}{digits}S"


def _utf8(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
