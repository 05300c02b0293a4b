"""Tables that commands print, once or updated in place. The only place that aligns columns."""

import io
import itertools
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

from jobs.telemetry import output
from pipeline import storage

Row = Sequence[str]


def render(rows: Iterable[Row], *, head: Row = (), right: Collection[int] = (), markdown: bool = False,
           fold: bool = True) -> str:
    """Rows as aligned columns.

    On a terminal the head is bold and, with `fold`, long cells wrap to fit its width. Elsewhere the table is plain
    text, one line for each row, as wide as its cells. With `markdown` it is a Markdown table there.
    `right`: columns of numbers, flush right.
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
                  pad_edge=markdown, padding=(0, 1) if markdown else (0, 2, 0, 0))
    for number, name in enumerate(head or [""] * max(map(len, rows), default=0)):
        table.add_column(Text(storage.escape_controls(name)), justify="right" if number in right else "left",
                         no_wrap=not fold, overflow="fold", min_width=3 if markdown else None)
    for row in rows:
        table.add_row(*(Text(storage.escape_controls(cell)) for cell in row))
    width = shutil.get_terminal_size().columns if fold else 1 << 20
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False,
                      color_system="auto" if terminal else None)
    with console.capture() as captured:
        console.print(table)
    lines = "\n".join(map(str.rstrip, captured.get().split("\n"))).strip("\n").split("\n")
    if markdown:
        lines[1] = "|".join(f"{rule[:-1]}:" if number - 1 in right else rule
                            for number, rule in enumerate(lines[1].split("|")))
    return "\n".join(lines)


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

