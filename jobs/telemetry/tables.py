"""Tables that commands print, once or updated in place. The only place that aligns columns."""

import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from jobs.telemetry import output
from pipeline import storage

if TYPE_CHECKING:
    from rich.text import Text

Row = Sequence[str]
_GAP = 2  # blanks between two columns
_WRAPPED = 24  # least characters of a last column that wraps, so that it is easy to read
_NARROW = 12  # the same where the only other choice is a paragraph for each row
_WITH_UNIT = re.compile(r"([\d–]) (?=[kMGTP]?B\b|\d\d:\d\d|UTC\b)")
_BOUND = "\ue000"  # a blank at which no line ends, while lines are made; rich and textwrap know none


def render(rows: Iterable[Row], *, head: Row = (), right: Collection[int] = (), markdown: bool = False,
           fold: bool = True, whole: Collection[int] = ()) -> str:
    """Rows as aligned columns.

    On a terminal the head is bold and, with `fold`, long cells wrap to fit its width. Elsewhere the table is plain
    text, one line for each row, as wide as its cells. With `markdown` it is a Markdown table there.
    `right`: columns of numbers, flush right. `whole`: columns of names that are copied. No line break is put into them,
    nor into a word. If they do not fit, each row is a paragraph.
    """
    # Most commands print no table, and need not wait 0.02 s for rich to load.
    from rich.text import Text
    terminal, rows = sys.stdout.isatty(), list(rows)
    fold = fold and terminal
    texts = [[Text(_bind_units(storage.escape_controls(cell))) for cell in row] for row in rows]
    width = shutil.get_terminal_size().columns if fold else 1 << 20
    names = [Text(storage.escape_controls(name)) for name in head or [""] * max(map(len, rows), default=0)]
    columns = [[name, *(row[number] for row in texts if number < len(row))] for number, name in enumerate(names)]
    widths = _column_widths(columns, {*whole, *right}, width) if fold else []
    if fold and rows and not widths:
        return _paragraphs([[" ".join([name, cell] if number and name and cell else [cell])
                             for number, (name, cell) in enumerate(itertools.zip_longest(head, row, fillvalue=""))]
                            for row in rows], 1, width)
    return _align(texts, names if head else [], widths or [None] * len(names), right, markdown and not terminal, width)


def _align(texts: "Sequence[Sequence[Text]]", head: "Sequence[Text]", widths: Sequence[int | None],
           right: Collection[int] = (), markdown: bool = False, width: int = 1 << 20, cut: bool = False) -> str:
    """Cells as aligned columns of these widths; a column without a width is as wide as its cells.

    Long cells wrap. With `cut` they end with an ellipsis instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    terminal = sys.stdout.isatty()
    table = Table(box=box.MARKDOWN if markdown else None, show_header=bool(head), header_style="bold",
                  pad_edge=markdown, padding=(0, 1) if markdown else (0, _GAP, 0, 0))
    for number, characters in enumerate(widths):
        table.add_column(head[number] if head else "", justify="right" if number in right else "left",
                         no_wrap=cut or characters is None, overflow="ellipsis" if cut else "fold",
                         min_width=3 if markdown else None, width=characters)
    for row in texts:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, height=25, force_terminal=terminal, highlight=False,
                      color_system="auto" if terminal else None)
    with console.capture() as captured:
        console.print(table)
    lines = "\n".join(map(str.rstrip, captured.get().replace(_BOUND, " ").split("\n"))).strip("\n").split("\n")
    if markdown:
        lines[1] = "|".join(f"{rule[:-1]}:" if number - 1 in right else rule
                            for number, rule in enumerate(lines[1].split("|")))
    return "\n".join(lines)


def _column_widths(columns: Sequence[Sequence["Text"]], whole: Collection[int], width: int) -> list[int]:
    """Characters of each column for lines of `width`, so that no word is cut, and no cell of the columns `whole`.

    Without enough room: no widths.
    """
    from rich.cells import cell_len
    widths = [max(cell_len(cell.plain) for cell in cells) for cells in columns]
    least = [widths[number] if number in whole else max((cell_len(word) for cell in cells
                                                         for word in cell.plain.split()), default=0)
             for number, cells in enumerate(columns)]
    room = width - _GAP * (len(columns) - 1)
    if sum(least) > room:
        return []
    while sum(widths) > room:
        widest = max((number for number in range(len(widths)) if widths[number] > least[number]),
                     key=lambda number: widths[number])
        widths[widest] -= 1
    return widths


def fit_width(rows: Iterable[Row], *, head: Row, title: int, cut: bool = False) -> str:
    """Rows for a terminal: aligned columns if its width allows them, otherwise paragraphs.

    1. Each column is as wide as its cells. Only the last column wraps.
    2. The same, with all cells after the first `title` in one column, "details".
    3. The other columns wrap too, between words. The first column holds names and never wraps.
    4. A paragraph for each row. It begins with the first `title` cells. Its lines after the first are indented.

    `cut`: one line for each row. The last column, or the paragraph, ends with an ellipsis where it does not fit.
    """
    from rich.cells import cell_len
    from rich.text import Text
    rows, width = list(rows), shutil.get_terminal_size().columns
    merged, merged_head = [_merge(row, title) for row in rows], [*head[:title], "details"]
    for cells, names, whole, least in ((rows, head, True, _WRAPPED), (merged, merged_head, True, _WRAPPED),
                                       (merged, merged_head, cut, _WRAPPED), (merged, merged_head, cut, _NARROW)):
        texts = [[Text(_bind_units(storage.escape_controls(cell))) for cell in row] for row in (names, *cells)]
        *short, last = (list(column) for column in zip(*texts, strict=True))
        wanted = min(max(cell_len(cell.plain) for cell in last), least)
        widths = _column_widths(short, range(len(short)) if whole else {0}, width - _GAP - wanted)
        if widths:
            widths.append(width - sum(widths) - _GAP * len(widths))
            return _align(texts[1:], texts[0], widths, width=width, cut=cut)
    text = _paragraphs(rows, title, 1 << 20 if cut else width)
    return "\n".join(_cut(line, width) for line in text.split("\n")) if cut else text


def _merge(row: Row, title: int) -> list[str]:
    """The cells of a row with those after the first `title` in one."""
    return [*row[:title], "; ".join(filter(None, row[title:]))]


def _cut(line: str, width: int) -> str:
    from rich.text import Text
    text = Text(line)
    text.truncate(width, overflow="ellipsis")
    return text.plain


def _paragraphs(rows: Iterable[Row], title: int, width: int) -> str:
    """A paragraph for each row: its first `title` cells with a gap, then the others. Words are not cut.

    An empty first cell indents the row.
    """
    lines = []
    for row in rows:
        cells = [_bind_units(storage.escape_controls(cell)) for cell in row]
        text = (" " * _GAP).join(filter(None, _merge(cells, title)))
        lines += textwrap.wrap(text, width, initial_indent="" if cells[0] else " " * _GAP, subsequent_indent="    ",
                               break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines).replace(_BOUND, " ")


def _bind_units(cell: str) -> str:
    return _WITH_UNIT.sub(rf"\1{_BOUND}", cell)


def show_live(texts: Iterable[str]) -> None:
    """Show each text in place of the one before, on a terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text
    with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="ellipsis") as live:
        for text in texts:
            live.update(Text.from_ansi(output.escape_text(text), no_wrap=True, overflow="ellipsis"), refresh=True)


def render_markdown(text: str) -> str:
    """A Markdown text. On a terminal its tables are rendered as aligned columns."""
    if not sys.stdout.isatty():
        return text
    parts = []
    for is_table, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
            parts.append(render(rows, head=head))
        else:
            parts += lines
    return "\n".join(parts) + "\n"

