"""Tables of the verbs: aligned and complete in a pipe, and fitted to the width of a terminal."""

import itertools
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing import credits
from jobs.publishing.garbage_collect import removed_table
from jobs.telemetry import tables
from tests.laws.golden import archives

_ROWS = [["a", "1", "x" * 300], ["[bold]b[/] :smile:", "12345", ""], ["日本", "0", "last\x1b[31m\nline"]]


def _columns(text: str) -> list[list[str]]:
    return [re.split(r"  +", line) for line in text.splitlines()]


def test_text_is_aligned_and_complete() -> None:
    lines = tables.render(_ROWS, right={1}).splitlines()
    assert lines == ["a                       1  " + "x" * 300, "[bold]b[/] :smile:  12345",
                     "日本                    0  last\\x1b[31m\\nline"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_markdown_table_has_a_rule_and_numbers_flush_right(count: int) -> None:
    lines = tables.render([["a", "1"]] * count, head=["name", "many hours"], right={1}, markdown=True).splitlines()
    assert lines == ["| name | many hours |", "|------|-----------:|", *["| a    |          1 |"] * count]


def test_names_and_words_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    rows = [["runs/emoji_32/samples/5d484cb4f0a9", "published, sealed", "4,191,280", "12.6 kB", "2026-11-26 18:30"]]
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = tables.render(rows, head=("name", "state", "rows", "size", "sealed"), right={2, 3}, whole={0})
        assert all(word in text for word in (rows[0][0], "published,", "4,191,280", "12.6 kB", "2026-11-26", "18:30"))
        assert max(map(len, text.splitlines())) <= columns
    monkeypatch.setenv("COLUMNS", "30")
    assert set(tables.render([["ViT-B-32-quickgelu", "a few words beside it"]]).split()) == {
        "ViT-B-32-quickgelu", "a", "few", "words", "beside", "it"}


def test_the_last_column_wraps_or_is_cut_before_rows_become_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    head, rows = ("name", "state", "rate", "failures"), [["emoji-flat", "sealed", "", ""],
                                                         ["emoji", "3 of 5", "10/s", "777 not_found " * 6 + "end"]]
    for columns, names in ((60, list(head)), (45, ["name", "state", "details"])):
        monkeypatch.setenv("COLUMNS", str(columns))
        wrapped, cut = (tables.fit_width(rows, head=head, title=2, cut=cut).splitlines() for cut in (False, True))
        assert wrapped[:2] == cut[:2] and wrapped[0].split() == names and wrapped[1].split() == ["emoji-flat", "sealed"]
        assert max(map(len, wrapped)) <= columns and " ".join(" ".join(wrapped[2:]).split()).endswith("not_found end")
        assert len(cut) == 3 and cut[2].endswith("…") and len(cut[2]) <= columns
    monkeypatch.setenv("COLUMNS", "25")
    wrapped, cut = (tables.fit_width(rows, head=head, title=2, cut=cut).splitlines() for cut in (False, True))
    assert wrapped[0] == "emoji-flat  sealed" and wrapped[2].startswith("    ") and len(wrapped) > 3
    assert cut == ["emoji-flat  sealed", "emoji  3 of 5  10/s; 777…"]


def test_a_table_without_rows_is_empty() -> None:
    assert tables.render([]) == ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return archives.unpack(archives.ROOT, tmp_path)


def _on_terminal(words: list[str], columns: int, **environment: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "jobs", *words], stdout=theirs, stderr=subprocess.PIPE,
                               env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns)} | environment)
    os.close(theirs)
    raw = b""
    while True:
        try:
            raw += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0
    os.close(ours)
    return raw.decode().replace("\r", "")


def test_status_loses_nothing_on_a_narrow_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--root", str(root)]) == 0
    plain = capsys.readouterr().out
    rows = _columns(plain)
    assert {len(row) for row in rows} <= {2, 3} and ["datasets/art/v1/index", "sealed"] in [row[:2] for row in rows]
    assert len({line.index(row[1]) for line, row in zip(plain.splitlines(), rows, strict=True)}) == 1
    narrow = _on_terminal(["status", "--root", str(root)], 50)
    assert max(map(len, narrow.splitlines())) <= 50 and len(narrow.splitlines()) > len(rows)
    assert sorted(re.sub(r"\s", "", narrow)) == sorted(re.sub(r"\s", "", plain))
    assert _columns(_on_terminal(["status", "--root", str(root)], 400)) == rows


@pytest.mark.slow
def test_plan_is_markdown_in_a_pipe_and_aligned_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    markdown_lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in markdown_lines}) == 1 and re.fullmatch(r"\|[-|:]+\|", markdown_lines[1])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown_lines]
    output = _on_terminal(["plan"], 200)
    assert "\x1b[1mstage" in output
    plain_lines = re.sub(r"\x1b\[[\d;]*m", "", output).splitlines()
    table_lines = list(itertools.takewhile(bool, plain_lines))
    assert [line.split() for line in table_lines] == [" ".join(row).split() for row in (cells[0], *cells[2:])]


def test_markdown_is_unchanged_in_a_pipe() -> None:
    text = "| a | b |\n|---|---|\n| 1 |  |\n\nnote\n"
    assert tables.render_markdown(text) == text


def test_markdown_is_aligned_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert tables.render_markdown("| a | long |\n|---|---|\n| 100 |  |\n| 2 | x |\n\nnote\n") == (
        "a    long\n100\n2    x\n\nnote\n")


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--json", "--root"]])
def test_rich_is_loaded_only_for_tables(arguments: list[str], tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-X", "importtime", "-m", "jobs", *arguments,
                              *([str(tmp_path)] if arguments[-1] == "--root" else [])], capture_output=True, text=True)
    assert process.returncode == 0 and "jobs.telemetry" in process.stderr
    assert not re.search(r"\| +(rich|tqdm)(\.|$)", process.stderr, re.MULTILINE)


def test_credits_and_removed_versions_are_aligned() -> None:
    picture = {"score": 0.5, "database": "art@v1", "key": "000001", "caption": "a cat", "url": "https://a/b",
               "source": "", "licence": "CC0", "spdx": "CC0-1.0", "authors": "someone", "title": "", "page": ""}
    removed_picture = picture | {"database": "photos@v12", "caption": "", "licence": "", "spdx": "", "authors": "",
                                 "note": "gone"}
    samples = [{"sample": "0000.png", "prompt": "a cat", "pictures": [picture, removed_picture]},
               {"sample": "0001.png", "prompt": "", "pictures": []}]
    assert credits.credits_text(samples).splitlines() == [
        "0000.png: a cat", "  0.500  art@v1/000001      a cat  https://a/b  (someone, CC0-1.0)",
        "  0.500  photos@v12/000001         https://a/b  (license unknown)   gone", "0001.png"]
    removed = [{"version": "v9", "kept": "published"},
               {"version": "v10", "kept": "", "removed_files": 3, "removed_bytes": 2_000_000, "taken_over": 1}]
    assert removed_table(removed, True).splitlines() == [
        "v9   kept: published",
        "v10  would be removed: 3 files, 2.0 MB; 1 files stay, for later versions took them over"]
