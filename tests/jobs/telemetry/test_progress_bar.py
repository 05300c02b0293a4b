"""The progress bar as a person sees it: commands run under a pseudo terminal, and what they write is played back."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.laws.terminal import Screen, run_on_screen, set_columns

_LONG = "a warning of " + "many " * 30 + "words"
_STAGE = f"""
import logging, os, signal, sys, time
from jobs.cli import main as cli
from jobs.telemetry.observe import run_observed
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed

class Slow(Stage):
    name = "slow"
    def __init__(self, root):
        super().__init__(root, "datasets/x/v1/shards", None)
    def section(self):
        return {{}}
    def plan(self):
        return [Item(f"{{number:06d}}") for number in range(12)]
    def rows(self, item):
        return 100
    def process(self, item, scratch):
        time.sleep(0.2)
        if item.id == "000006":
            logging.getLogger("pipeline.slow").warning({_LONG!r})
            print("a library says this", file=sys.stderr)
        if item.id == "000009" and sys.argv[2] == "fault":
            raise StageFailed("slow: the ninth item is broken")
        return Output(samples=100, info={{"rows": 100}})

def act(arguments):
    run_observed(Slow(sys.argv[1]), name="[slow] stage")
    print('{{"data": true}}')
    return 0

if sys.argv[2] == "interrupt":  # Ctrl-C arrives while the first bar is written
    write = sys.stderr.write
    def write_and_interrupt(text):
        write(text)
        sys.stderr.flush()
        if "%" in text:
            sys.stderr.write = write
            os.kill(os.getpid(), signal.SIGINT)
        return len(text)
    sys.stderr.write = write_and_interrupt

cli.parse_command = lambda arguments, **_: (act, arguments)
sys.exit(cli.main(["embed", *sys.argv[3:]]))
"""


def _bars(seen: Screen) -> list[str]:
    """The lines that show the bar."""
    return [line for line in seen.lines if line.startswith("[slow] stage")]


def _stage(root: Path, how: str = "", *flags: str) -> list[str]:
    return [sys.executable, "-c", _STAGE, str(root), how, *flags]


def test_log_lines_stay_whole_above_the_bar_and_the_bar_ends_full(tmp_path: Path) -> None:
    seen = run_on_screen(_stage(tmp_path))
    assert seen.code == 0 and len(_bars(seen)) == 1
    assert "100%" in _bars(seen)[0] and "1200 of 1200 rows" in _bars(seen)[0] and "100.0% good" in _bars(seen)[0]
    shown = "\n".join(seen.lines)
    assert f" {_LONG}" in shown.replace("\n", "")  # wrapped by the terminal, and nothing between its words
    assert "a library says this" in seen.lines
    assert seen.lines.index("a library says this") < seen.lines.index(_bars(seen)[0])
    assert seen.lines[seen.lines.index(_bars(seen)[0]) + 1] == '{"data": true}'
    assert seen.raw.count("\x1b[?25l") == seen.raw.count("\x1b[?25h") == 1


def test_after_an_exception_the_bar_is_closed_before_the_error(tmp_path: Path) -> None:
    seen = run_on_screen(_stage(tmp_path, "fault"))
    assert seen.code == 1 and len(_bars(seen)) == 1 and "%" in _bars(seen)[0]
    assert "error: slow: the ninth item is broken" in seen.lines
    assert seen.lines.index(_bars(seen)[0]) < seen.lines.index("error: slow: the ninth item is broken")
    assert seen.raw.index("\x1b[?25h") < seen.raw.index("error: ")


def test_ctrl_c_closes_the_bar(tmp_path: Path) -> None:
    pressed: list[float] = []

    def press(terminal: int, process: Any, raw: bytes) -> None:
        if not pressed and b"%" in raw:
            pressed.append(time.monotonic())
            process.send_signal(signal.SIGINT)

    seen = run_on_screen(_stage(tmp_path), meanwhile=press)
    assert pressed and seen.code == 130 and len(_bars(seen)) == 1 and "100%" not in _bars(seen)[0]
    assert "stopped; the same command continues from here" in seen.lines and "Traceback" not in seen.raw
    assert seen.raw.index("\x1b[?25h") < seen.raw.index("stopped; ")


def test_ctrl_c_while_the_bar_is_written_leaves_one_bar(tmp_path: Path) -> None:
    seen = run_on_screen(_stage(tmp_path, "interrupt"))
    assert seen.code == 130 and len(_bars(seen)) == 1 and _bars(seen)[0].count("[slow] stage") == 1
    assert "stopped; the same command continues from here" in seen.lines and "Traceback" not in seen.raw


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_cuts_the_bar_to_one_line(tmp_path: Path, columns: int) -> None:
    seen = run_on_screen(_stage(tmp_path), columns)
    assert len(_bars(seen)) == 1 and len(_bars(seen)[0]) <= columns and _bars(seen)[0].rstrip().endswith("…")
    assert "100%" in _bars(seen)[0]


def test_after_a_resize_the_bar_fits_the_new_width(tmp_path: Path) -> None:
    resized: list[int] = []

    def resize(terminal: int, process: Any, raw: bytes) -> None:
        if not resized and b"%" in raw:
            resized.append(len(raw))
            set_columns(terminal, 60)

    seen = run_on_screen(_stage(tmp_path), meanwhile=resize)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", seen.raw[resized[0]:]).replace("\r", "\n").split("\n")
    bars = [line for line in shown if line.startswith("[slow] stage") and "%" in line]
    assert len(bars) > 1 and all(len(line) <= 60 for line in bars)


@pytest.mark.slow
def test_no_color_removes_colors(tmp_path: Path) -> None:
    seen = run_on_screen(_stage(tmp_path), NO_COLOR="1")
    assert len(_bars(seen)) == 1 and not re.search(r"\x1b\[[\d;]*(3[0-7]|38|9[0-7])[\d;]*m", seen.raw)
    assert re.search(r"\x1b\[[\d;]*(3[0-7]|38|9[0-7])[\d;]*m", run_on_screen(_stage(tmp_path / "other")).raw)


@pytest.mark.parametrize(("flags", "environment"), [
    ((), {"TERM": "dumb"}), (("--log-format", "json"), {}), ((), {"RDM_LOG": "json"})])
def test_without_a_usable_terminal_progress_is_lines(tmp_path: Path, flags: tuple[str, ...],
                                                     environment: dict[str, str]) -> None:
    seen = run_on_screen(_stage(tmp_path, "", *flags), 1000, **environment)
    assert seen.code == 0 and "\x1b" not in seen.raw
    assert sum("12 of 12 items, 1200 of 1200 rows" in line for line in seen.lines) == 1


def test_a_piped_stderr_has_lines(tmp_path: Path) -> None:
    done = subprocess.run(_stage(tmp_path), capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": os.getcwd(), "FORCE_COLOR": "1", "TERM": "xterm"})
    assert done.returncode == 0 and done.stdout == '{"data": true}\n' and "\x1b" not in done.stderr
    assert "slow] stage: 12 of 12 items, 1200 of 1200 rows" in done.stderr and f" {_LONG}\n" in done.stderr
