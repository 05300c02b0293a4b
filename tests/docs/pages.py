"""Reads Markdown pages: links, code, anchors, each with its line."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
PAGES = [Path(file) for file in FILES if file.endswith(".md") and (ROOT / file).exists()]
_FENCE = re.compile(r"^ *(```+)(\w*)")


@dataclass(frozen=True)
class Block:
    """A block of code. `line` is that of its first line of code, counted from 1."""

    line: int
    language: str
    lines: tuple[str, ...]


def read_page(page: Path) -> list[str]:
    return (ROOT / page).read_text().splitlines()


def split_page(lines: list[str]) -> tuple[dict[int, str], list[Block]]:
    """The prose of a page by line number, and its blocks of code, fenced or indented."""
    prose: dict[int, str] = {}
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        start = number
        if fence := _FENCE.match(lines[number]):
            number += 1
            while number < len(lines) and lines[number].strip() != fence[1]:
                number += 1
            blocks.append(Block(start + 2, fence[2], tuple(line.strip() for line in lines[start + 1:number])))
            number += 1
        elif lines[number].startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            blocks.append(Block(start + 1, "", tuple(line[4:] for line in lines[start:number])))
        else:
            prose[start + 1] = lines[number]
            number += 1
    return prose, blocks


def join_continued(block: Block) -> Iterator[tuple[int, str]]:
    """The lines of a block. A line that ends with a backslash is joined with the next one."""
    whole, start = "", block.line
    for number, line in enumerate(block.lines, block.line):
        start = start if whole else number
        whole += line.rstrip()
        if whole.endswith("\\"):
            whole = whole[:-1]
        else:
            yield start, whole
            whole = ""


def inline_code(prose: dict[int, str]) -> Iterator[tuple[int, str]]:
    """The spans of code in the prose. A span may begin on one line and end on the next."""
    numbers = list(prose)
    text = "\n".join(prose.values())
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield numbers[text.count("\n", 0, match.start())], " ".join(match[1].split())


def links(prose: dict[int, str]) -> Iterator[tuple[int, str]]:
    """The targets of links and images, those of HTML included."""
    for number, line in prose.items():
        for match in re.finditer(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", re.sub(r"`[^`]*`", "", line)):
            yield number, match[1] or match[2]


def anchors(lines: list[str]) -> set[str]:
    """The anchors of the headings of a page, as code hosts and the site make them."""
    prose, _ = split_page(lines)
    headings = [line.lstrip("#").strip() for line in prose.values() if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip().lower().replace(" ", "-")
            for heading in headings}
