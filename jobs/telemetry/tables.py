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
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    terminal, rows = sys.stdout.isatty(), list(rows)
    fold = fold and terminal
    markdown = markdown and not terminal
    table = Table(box=box.MARKDOWN if markdown else None, show_header=bool(head), header_style="bold",
                  pad_edge=markdown, padding=(0, 1) if markdown else (0, _GAP, 0, 0))
    texts = [[Text(_bind_units(storage.escape_controls(cell))) for cell in row] for row in rows]
    width = shutil.get_terminal_size().columns if fold else 1 << 20
    names = [Text(storage.escape_controls(name)) for name in head or [""] * max(map(len, rows), default=0)]
    columns = [[name, *(row[number] for row in texts if number < len(row))] for number, name in enumerate(names)]
    widths = _column_widths(columns, {*whole, *right}, width) if fold else []
    if fold and rows and not widths:
        return _paragraphs([[" ".join([name, cell] if number and name and cell else [cell])
                             for number, (name, cell) in enumerate(itertools.zip_longest(head, row, fillvalue=""))]
                            for row in rows], 1, width)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number in right else "left", no_wrap=not fold, overflow="fold",
                         min_width=3 if markdown else None, width=widths[number] if widths else None)
    for cells in texts:
        table.add_row(*cells)
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


def render_or_list(rows: Iterable[Row], *, head: Row, title: int) -> str:
    """Rows as aligned columns, or as paragraphs on a terminal that is too narrow for their lines.

    A paragraph begins with the first `title` cells. Its lines after the first are indented.
    """
    from rich.cells import cell_len
    rows = list(rows)
    width = shutil.get_terminal_size().columns
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    if not sys.stdout.isatty() or sum(widths) + _GAP * (len(widths) - 1) <= width:
        return render(rows, head=head)
    return _paragraphs(rows, title, width)


def _paragraphs(rows: Iterable[Row], title: int, width: int) -> str:
    """A paragraph for each row: its first `title` cells with a gap, then the others. Words are not cut.

    An empty first cell indents the row.
    """
    lines = []
    for row in rows:
        cells = [_bind_units(storage.escape_controls(cell)) for cell in row]
        text = (" " * _GAP).join(filter(None, [*cells[:title], "; ".join(filter(None, cells[title:]))]))
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

