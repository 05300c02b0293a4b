"""JSON as rows: lines of objects, arrays of objects, objects one after another, or columns as pandas writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.tables.cells import JsonDecoder, TableRow, check_json_row, replace_surrogates
from pipeline.tables.delimited import RepairedLine, encoding_remarks, repair_lines

_LONGEST = 1 << 26  # characters of one value
_RECORDS = "hint: write an object in each line; pandas: to_json(orient='records', lines=True)"


def read_json_lines(lines: Iterator[str], file: str) -> Iterator[TableRow]:
    """The objects of lines of JSON. A line that is none is a row that cannot be read."""
    row_number, decoder = 0, JsonDecoder()
    for number, line in enumerate(repair_lines(lines), 1):
        if not line.strip():
            continue
        row_number += 1
        try:
            cells = decoder.parse_row(line)
        except ValueError as error:
            yield TableRow({}, (), f"{file}, row {row_number}, line {number}", str(error))
            continue
        yield _table_row(cells, line, decoder)


def read_json_document(pieces: Iterator[str], file: str) -> Iterator[TableRow]:
    """The objects of a JSON file, whose text comes in pieces."""
    decoder = JsonDecoder()
    values = _read_values(repair_lines(pieces), decoder)
    first = next(values, None)
    if first is None:
        return
    second = next(values, None)
    if second is None and isinstance(first[0], dict) and (rows := _table_rows(first[0])):
        yield from map(TableRow, rows)
        return
    number = 0
    for value, text in (each for group in ([first], [second] if second else [], values) for each in group):
        number += 1
        try:
            cells = check_json_row(value, text)
        except ValueError as error:
            yield TableRow({}, (), f"{file}, row {number}", str(error))
            continue
        yield _table_row(cells, text, decoder)


def _table_row(cells: dict[str, Any], text: str, decoder: JsonDecoder) -> TableRow:
    remarks = decoder.take_remarks(cells, text)
    if "\\u" in text:
        cells = {replace_surrogates(name): cell for name, cell in cells.items()}
    return TableRow(cells, [*remarks, *encoding_remarks(cells)] if isinstance(text, RepairedLine) else remarks)


def _read_values(pieces: Iterator[str], decoder: JsonDecoder) -> Iterator[tuple[Any, str]]:
    """(value, its text) of the arrays that a file holds, or of values one after another."""
    in_array, ended = False, False
    buffer, position, text_type = "", 0, str
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer[position:position + 1] == "[" and not in_array:
            in_array, position = True, position + 1
            continue
        if in_array and buffer[position:position + 1] == "]":
            in_array, position = False, position + 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, position)
        except RecursionError:
            raise ValueError("more than 64 levels of brackets") from None
        except ValueError as error:
            if ended and position == len(buffer) and not in_array:
                return
            if ended or len(buffer) - position > _LONGEST:
                raise ValueError(str(error) if position < len(buffer) else "the array is not closed") from None
            value, end = None, len(buffer)
        if end == len(buffer) and not ended:  # a value may continue in the next piece
            # As many characters as are there already, or a long value would be decoded again for each piece.
            more = list(_at_least(pieces, end - position))
            ended = not more
            text_type = RepairedLine if any(isinstance(piece, RepairedLine) for piece in more) else text_type
            buffer, position = "".join((buffer[position:], *more)), 0
            continue
        yield value, text_type(buffer[position:end])
        position = end


def _at_least(pieces: Iterator[str], length: int) -> Iterator[str]:
    """The next pieces that together have `length` characters, at least one."""
    for piece in pieces:
        yield piece
        length -= len(piece)
        if length <= 0:
            return


def _table_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object that holds a table, [] if it is none: columns, or one of the layouts of pandas.

    ValueError for columns that do not fit together.
    """
    columns, data, values = document.get("columns"), document.get("data"), list(document.values())
    if (document.keys() <= {"columns", "index", "data"} and isinstance(columns, list) and isinstance(data, list)
            and all(isinstance(row, list) and len(row) == len(columns) for row in data)):
        return [dict(zip(columns, row, strict=True)) for row in data]
    if document.keys() == {"schema", "data"} and isinstance(data, list):
        return data if all(isinstance(row, dict) for row in data) else []
    if values and all(isinstance(column, list) for column in values):
        _check_columns({name: set(range(len(column))) for name, column in document.items()})
        return [dict(zip(document, cells, strict=True)) for cells in zip(*values, strict=True)]
    if not values or not all(isinstance(column, dict) and column for column in values):
        return []
    if all(key.isdigit() for column in values for key in column):
        _check_columns({name: set(column) for name, column in document.items()})
        return [{name: column[key] for name, column in document.items()} for key in values[0]]
    if all(key.isdigit() for key in document):
        return values
    if len(values) > 1 and all(column.keys() == values[0].keys() for column in values):
        raise ValueError(f"its objects may be rows or columns: all have the names {', '.join(values[0])[:200]}\n"
                         f"{_RECORDS}")
    return []


def _check_columns(rows: dict[str, set[Any]]) -> None:
    """ValueError unless all columns have the same rows."""
    first, *others = rows
    if other := next((name for name in others if rows[name] != rows[first]), None):
        raise ValueError(f"its columns have other rows: {first} has {len(rows[first])}, {other} has "
                         f"{len(rows[other])}\n{_RECORDS}")
