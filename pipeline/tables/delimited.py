"""CSV and TSV as rows. A row that breaks the rules is named, and the rows after it are read as if it were not there.

pyarrow, pandas and `csv` were compared. After a quote that is never closed, all of them read the following rows as one
cell. pyarrow can skip a row with too many cells, but does not name its line.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.tables.cells import TableRow, unique_names
from pipeline.tables.names import COMPRESSIONS, table_kind

_LONGEST = 1 << 26  # characters of a cell
_MOST_LINES = 1000  # of a quoted cell: a quote that is never closed costs no more than these
_MOST_HEADER_LINES = 5
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*://.+|.+\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jxl))\s*", re.I)
_NUMBER = re.compile(r"\s*[\d.-]*\d[\d.-]*\s*")
_WORD, _WORD_WITH_DIGIT = re.compile(r"\s*\S+\s*"), re.compile(r"\s*\S*\d\S*\s*")
_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.I)
csv.field_size_limit(_LONGEST)  # one limit for the process; the usual one, 131,072, is too small for captions


class RepairedLine(str):
    """A line with bytes that are not UTF-8, which became U+FFFD."""

    __slots__ = ()


def repair_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines that were decoded with `surrogateescape`; those with bytes that are not UTF-8 as `RepairedLine`."""
    for line in lines:
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                line = RepairedLine(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        yield line


def encoding_remarks(cells: dict[str, Any]) -> list[str]:
    """A remark for each column of a repaired line that holds U+FFFD."""
    return [f"cell_changed: {name}: bytes that are not UTF-8" for name, cell in cells.items()
            if isinstance(cell, str) and "\ufffd" in cell]


class _Lines:
    """Lines with their numbers. Lines may be put back, to be read once more."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


def read_delimited(lines: Iterator[str], file: str, delimiter: str, names: Sequence[str] = ()) -> Iterator[TableRow]:
    """The rows of a CSV (`,`) or a TSV (a tab, without quoting); `names`: the columns of a file without a header.

    A CSV may name another delimiter in a first line such as `sep=;`.

    A TSV whose header is quoted is read with quotes, like a CSV.
    """
    numbered = _Lines(repair_lines(lines))
    remarks: list[str] = []
    quoted, header = delimiter == ",", ""
    if quoted and (first := next(numbered, "")):
        if separator := named_delimiter(first):
            delimiter = separator
        else:
            numbered.put_back([first])
    if not names:
        header = next((line for line in numbered if line.strip(" \r\n")), "").removeprefix("\ufeff")
        if not header:
            return
        quoted = quoted or header.startswith('"')
        found, taken, problem = (_parse_record(header, numbered, delimiter) if quoted else
                                 (header.rstrip("\r\n").split(delimiter), [], ""))
        if found is None or len(taken) > _MOST_HEADER_LINES:
            raise ValueError(f"the header cannot be read: {problem or 'a quote is not closed'}")
        names, remarks = unique_names(found)
    records = (_quoted_records(numbered, delimiter, len(names), all_quoted=header.startswith('"')) if quoted else
               _plain_records(numbered, delimiter, len(names)))
    for number, (line, cells, remark, problem) in enumerate(records, 1):
        if cells is None:
            place = f"{file}, row {number}, line {line}"
            yield TableRow({}, remarks, place, problem)
        else:
            row = TableRow(dict(zip(names, [cell or None for cell in cells], strict=True)), remarks)
            if remark:
                row.remarks = [*remarks, *(encoding_remarks(row.cells) if remark == _REPAIRED else [remark])]
            yield row
        if remarks:
            remarks = []


def named_delimiter(line: str) -> str:
    """The delimiter that a first line such as `sep=;` names, as Excel writes it; "" for other lines."""
    match = _SEPARATOR.fullmatch(line)
    return match[1] if match else ""


def check_delimiter(names: Sequence[str], address: str) -> None:
    """ValueError if the only name in the header of a CSV or TSV holds another delimiter."""
    kind, file = table_kind(address), address.rpartition("/")[2]
    others = {"csv": "\t;|", "tsv": ",;|"}.get(kind, "")
    delimiter = next((each for each in others if each in names[0]), "") if len(names) == 1 else ""
    if not delimiter:
        return
    if delimiter in ",\t":
        suffix = ".csv" if delimiter == "," else ".tsv"
        raise ValueError(f"{address}: the header has {delimiter!r}, which a {suffix} has\n"
                         f"hint: end its name in {suffix}")
    if kind == "tsv" or address.lower().endswith(COMPRESSIONS):
        raise ValueError(f"{address}: the header has {delimiter!r}, and not the delimiter of a {kind}\n"
                         f"hint: write a .csv that is not compressed, with the first line sep={delimiter}")
    target = shlex.quote(f"sep_{file}")
    raise ValueError(f"{address}: the header has {delimiter!r} and no comma\n"
                     f"hint: (echo 'sep={delimiter}'; cat {shlex.quote(file)}) > {target}")


_REPAIRED = "repaired"
_HOLDS_ROWS = ("a quote is not closed, or a line of the cell looks like a row\n"
               "hint: close the quote; if the cell is one text, take its line breaks out or write the list as parquet")
_Record = tuple[int, "list[str] | None", str, str]  # number of the line, cells, remark, problem


def _plain_records(lines: _Lines, delimiter: str, width: int) -> Iterator[_Record]:
    """Records of one line each, without quotes."""
    for line in lines:
        number, cells = lines.number, line.rstrip("\r\n").split(delimiter)
        if len(cells) != width:
            if line.strip(" \r\n"):
                yield number, None, "", _width_problem(len(cells), width)
            continue
        remark = ""
        if isinstance(line, RepairedLine):
            remark = _REPAIRED
        elif '"' in line:
            remark = _kept_quotes(cells, lines, delimiter)
        yield number, cells, remark, ""


def _kept_quotes(cells: list[str], lines: _Lines, delimiter: str) -> str:
    """A remark if a cell of a TSV looks quoted as in CSV: with doubled quotes inside, or open before what is no row."""
    if any(len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1] for cell in cells):
        return "quotes_kept: a cell looks quoted as in CSV, and TSV has no quoting"
    if cells[-1].startswith('"') and cells[-1].count('"') % 2 and (following := next(lines, None)) is not None:
        lines.put_back([following])
        if following.count(delimiter) + 1 != len(cells):
            return "quotes_kept: a cell seems to have several lines in quotes as in CSV, and TSV has no quoting"
    return ""


def _quoted_records(lines: _Lines, delimiter: str, width: int, *, all_quoted: bool) -> Iterator[_Record]:
    """Records by the rules of RFC 4180, which may span lines.

    `all_quoted`: the writer quotes each text, so a later row has quotes and does not close an open one by chance.
    """
    for line in lines:
        number = lines.number
        if '"' not in line:
            cells = line.rstrip("\r\n").split(delimiter)
            if len(cells) == width:
                yield number, cells, _REPAIRED if isinstance(line, RepairedLine) else "", ""
            elif line.strip(" \r\n"):
                yield number, None, "", _width_problem(len(cells), width)
            continue
        found, taken, problem = _checked_record(line, lines, delimiter, width, all_quoted)
        remark = ""
        if found is None:
            lines.put_back(taken)
            if '\\"' in line:  # Spark writes \" where CSV has ""
                found, taken, _ = _checked_record(line, lines, delimiter, width, all_quoted, backslash=True)
                remark = "backslash_quotes: read as Spark writes quotes"
                if found is None:
                    lines.put_back(taken)
        if found is None:
            yield number, None, "", problem
        else:
            repaired = isinstance(line, RepairedLine) or any(isinstance(more, RepairedLine) for more in taken)
            yield number, found, _REPAIRED if repaired else remark, ""


def _checked_record(line: str, lines: _Lines, delimiter: str, width: int, all_quoted: bool, *,
                    backslash: bool = False) -> tuple[list[str] | None, list[str], str]:
    """(cells, the lines read for it after the first, problem): no cells if they are not `width`, or hold other rows."""
    cells, taken, problem = _parse_record(line, lines, delimiter, backslash)
    if cells is not None and len(cells) != width:
        return None, taken, _width_problem(len(cells), width)
    if cells is not None and taken and _holds_rows(cells, [line, *taken], delimiter, only_addresses=all_quoted):
        return None, taken, _HOLDS_ROWS
    return cells, taken, problem


def _parse_record(line: str, lines: Iterator[str], delimiter: str, backslash: bool = False,
                  ) -> tuple[list[str] | None, list[str], str]:
    taken: list[str] = []

    def feed() -> Iterator[str]:
        yield line
        length = len(line)
        for more in lines:
            taken.append(more)
            length += len(more)
            if len(taken) == _MOST_LINES or length > _LONGEST:
                raise csv.Error(f"a quote is not closed within {len(taken)} lines")
            yield more

    try:
        reader = csv.reader(feed(), delimiter=delimiter, strict=True, doublequote=not backslash,
                            escapechar="\\" if backslash else None)
        return next(reader), taken, ""
    except csv.Error as error:
        text = str(error)
        if "unexpected end of data" in text:
            text = "a quote is not closed before the end of the file"
        elif "expected after" in text:
            text = "text follows a closing quote, or an earlier quote is not closed"
        return None, taken, text


def _holds_rows(cells: Sequence[str], lines: Sequence[str], delimiter: str, *, only_addresses: bool) -> bool:
    """Whether a record that spans lines looks like several rows, after a quote that is not closed.

    A line looks like a row if it has a URL or a file name in a column where the record has one, and not too few cells.
    If the record has neither, the line must have the right number of cells, and a number or a word in a column where
    the record has one. If the record has none of these, the number of cells is enough. Blanks after the delimiters, as
    texts have them after commas, count as cells only if the record has such blanks too.
    """
    broken = [number for number, cell in enumerate(cells) if "\n" in cell]
    whole = [number for number, cell in enumerate(cells) if cell and "\n" not in cell]
    if len(cells) == 1 or not broken:
        return len(cells) == 1
    is_spaced = any(cells[number].startswith(" ") for number in whole if number)
    split = [line.rstrip("\r\n").split(delimiter) for line in lines]
    if only_addresses:  # a row begins with a quote, a number or nothing
        split[1:] = [other if other[0][:1] in {"", '"'} or _NUMBER.fullmatch(other[0]) else [] for other in split[1:]]
    fits = [len(other) == len(cells) and (is_spaced or not any(cell.startswith(" ") for cell in other[1:]))
            for other in split]
    # The cells before the broken one are those of the first line itself, and the cells after it those of the last.
    # Delimiters may be in the broken column: columns after it are counted from the end.
    others = [(column, other[column if column < broken[0] else column - len(cells)], fits[number])
              for number, other in enumerate(split) if len(other) >= len(cells) for column in whole
              if (number > 0 or column > broken[-1]) and (number < len(lines) - 1 or column < broken[0])]
    kinds = {column: _kind(cells[column]) for column in whole}
    if only_addresses or _ADDRESS in kinds.values():
        return any(kinds[column] is _ADDRESS and _ADDRESS.fullmatch(other.strip('"')) for column, other, _ in others
                   if other.startswith('"') or not only_addresses)
    # Rows end with a carriage return, and the lines inside the cell do not.
    if lines[-1].endswith("\r\n") and not any(line.endswith("\r\n") for line in lines[:-1]):
        return False
    has_kind = any(kinds.values())
    return any(is_row and (not has_kind or ((kind := kinds[column]) and kind.fullmatch(other.strip('"'))))
               for column, other, is_row in others)


def _kind(cell: str) -> re.Pattern[str] | None:
    """The pattern that cells of other rows in the same column match, None for texts."""
    if _ADDRESS.fullmatch(cell):
        return _ADDRESS
    return _WORD_WITH_DIGIT if _NUMBER.fullmatch(cell) else _WORD if _WORD.fullmatch(cell) else None


def _width_problem(count: int, width: int) -> str:
    return f"{count} cells, and the header has {width}"
