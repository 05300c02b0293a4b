"""Every page can be found, and every link leads somewhere."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import FILES, PAGES, ROOT, anchors, links, read_page, split_page

NAVIGATION = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]


def _pages(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for inner in entries.values():
            yield from _pages(inner)
    elif isinstance(entries, list):
        for inner in entries:
            yield from _pages(inner)


def test_every_page_of_the_documents_is_in_the_navigation_once() -> None:
    named = list(_pages(NAVIGATION))
    there = {str(page.relative_to("docs")) for page in PAGES if page.parts[0] == "docs"}
    missing = sorted(there - {*named})
    assert not missing, f"zensical.toml: nav lacks {missing}\nhint: add one line for each page"
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose, _ = split_page(read_page(page))
    wrong = []
    for number, target in links(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists():
            wrong.append(f"{page}:{number}: there is no {target}")
        elif anchor and anchor not in anchors(file.read_text().splitlines()):
            wrong.append(f"{page}:{number}: there is no heading for {target}")
        elif page.parts[0] == "docs" and not file.is_relative_to(ROOT / "docs"):
            wrong.append(f"{page}:{number}: {target} is outside docs/, so the site lacks it; name the file as code")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    wrong = []
    for number, line in enumerate(read_page(page), 1):
        for name in re.findall(r"(?<![\w/.-])(?:pipeline|jobs|model|tests|infra|docs)/"
                               r"[\w/.-]+\.(?:py|sh|md|json|yaml|toml|png|npz|safetensors)\b", line):
            # Some pages name files from the folder that they describe.
            if not any(f"/{file}".endswith(f"/{name}") for file in FILES):
                wrong.append(f"{page}:{number}: there is no {name}")
    assert not wrong, "\n".join(wrong)
