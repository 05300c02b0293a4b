"""Every command of the documents is parsed by the command line, and every flag that is named exists."""

import contextlib
import functools
import io
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli.parse import parse_command
from jobs.cli.verbs import VERBS
from jobs.config.toml import resolve_settings
from tests.docs.pages import PAGES, ROOT, inline_code, join_continued, read_page, split_page
from tests.docs.reference import flags_of

CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it names flags of earlier versions
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
_OTHERS = {"--no-deps", "--nproc-per-node", "--shm-size", "--vulnerability-service"}
"""Flags of other programs that the documents name without their program."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@functools.cache
def _flags(verb: str) -> set[str]:
    flags = {flag.name for flag in flags_of(verb)}
    return flags | {re.sub(r"^--((?:[\w-]+\.)*)", r"--\1no-", flag) for flag in flags}


def _all_flags() -> set[str]:
    return set().union(*map(_flags, VERBS)) | {"--version", "--completion", "--help", "--help-all"}


def _command_words(line: str) -> list[str] | None:
    """The words after `python -m jobs` or `rdm`; None if the line is no such command."""
    command = re.search(r"(?:^|[\s/])(?:-m jobs|rdm) +(?=[a-z-])(.*)", line)
    if not command or re.match(r"\s*(?:#|usage:|kubectl|eval|docker|ray )", line):
        return None
    lexer = shlex.shlex(command[1], posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: word not in {"|", ">", "<", "&&", ";", "&"}, lexer)) or None


def _parse(words: list[str]) -> None:
    """Parse a command, and the command that `submit` sends. ValueError with the parser's own words."""
    if words[0].startswith("--"):
        assert words[0] in {"--version", "--help", "--completion"}, words
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            _, options = parse_command([word for word in words if word not in {"--help", "--help-all"}]
                                       if len(words) > 2 else words)
    except SystemExit as ended:
        if ended.code:
            raise ValueError(" ".join(printed.getvalue().split())[-300:]) from None
        return
    if words[0] == "submit":
        _parse(list(options.words))


def _commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    _, blocks = split_page(read_page(page))
    for block in blocks:
        for number, line in join_continued(block):
            if block.language not in {"python", "text", "mermaid", "json", "toml"} and (words := _command_words(line)):
                yield number, words


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_commands_are_parsed(page: Path, tmp_path: Path) -> None:
    _, blocks = split_page(read_page(page))
    for block in blocks:
        if block.language == "toml" and page.name != "CONTRIBUTING.md":
            (tmp_path / "settings.toml").write_text("\n".join(block.lines))
            resolve_settings("", str(tmp_path / "settings.toml"))
    wrong = []
    for number, words in _commands(page):
        try:
            _parse(words)
        except ValueError as error:
            wrong.append(f"{page}:{number}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_flags_and_verbs_in_the_text_exist(page: Path) -> None:
    lines = read_page(page)
    prose, _ = split_page(lines)
    if page.parts[:2] == ("docs", "coming-from"):  # the first cells have the flags of the other program
        prose = {number: re.sub(r"^\|[^|]*\|", "|", line) for number, line in prose.items()}
    wrong = []
    for number, span in inline_code(prose):
        if span.startswith(("pip ", "uv ", "docker ", "ray ", "kubectl ", "pytest ", "torchrun ", "apt-get ", "make ")):
            continue
        named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", span))
        if words := _command_words(span):
            if words[0] not in VERBS and not words[0].startswith("--"):
                wrong.append(f"{page}:{number}: there is no verb {words[0]!r}")
                continue
            known = _flags(words[0]) | _all_flags() if words[0] == "submit" else _flags(words[0])
        elif script := re.match(r"(?:\S*python3? )?((?:tests|infra)/[\w/.-]+\.(?:py|sh))", span):
            known = set(re.findall(r"--[a-z][\w-]*", (ROOT / script[1]).read_text()))
        elif (first := span.split()[0]) in VERBS and named and first != "submit":
            known = _flags(first)
        else:
            known = _all_flags() | _OTHERS
        known = known | {"--help", "--help-all", "--version", "--completion"}
        wrong += [f"{page}:{number}: there is no flag {flag} in `{span}`" for flag in sorted(named - known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    prose, blocks = split_page(read_page(page))
    code = [*inline_code(prose), *(pair for block in blocks for pair in join_continued(block))]
    wrong = [f"{page}:{number}: there is no make target {target}" for number, text in code
             for target in re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", text) if target not in TARGETS]
    assert not wrong, "\n".join(wrong)


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, text=True, capture_output=True, check=True,
                           env=os.environ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == TARGETS
