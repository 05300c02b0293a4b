"""The documents name files, links and commands that exist."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.layouts import known

ROOT = Path(__file__).parents[2]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
DOCUMENTS = [Path(file) for file in FILES if file.endswith(".md")]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown document, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower().replace(" ", "-")
            for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = (ROOT / document).read_text()
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_of_the_project_that_are_named_exist(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("it names files of earlier versions")
    named = re.findall(r"(?<![\w/.-])(?:pipeline|jobs|model|tests|infra|docs)/[\w/.-]+\.(?:py|sh|md|json|yaml|toml)\b",
                       (ROOT / document).read_text())
    # Some documents name files from the folder that they describe.
    assert sorted({name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)}) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_make_targets_that_are_named_exist(document: Path) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:`|^ {4}|\n)make ([a-z][a-z-]*)", text))
    assert named <= TARGETS


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == TARGETS


def test_each_reason_for_leaving_out_an_image_is_explained() -> None:
    text = (ROOT / "docs/ledger.md").read_text()
    used = {reason for file in (ROOT / "pipeline").rglob("*.py")
            for reason in re.findall(r'(?:BadImage|NotFetched)\("(\w+)"', file.read_text())}
    assert "too_many_scans" in used and {reason for reason in used if f"`{reason}`" not in text} == set()


def test_the_table_of_corpora_has_every_layout_and_its_columns() -> None:
    text = (ROOT / "docs/corpora.md").read_text()
    rows = {cells[1].strip(): cells for line in text.splitlines() if len(cells := line.split("|")) == 7}
    for layout in known.TABLES:
        name, recognized, url, caption, *_ = rows[layout.name][1:]
        assert re.findall("`(.+?)`", recognized) == list(layout.has), name
        assert layout.url in url.replace("`", "").strip() and layout.caption in caption, name
