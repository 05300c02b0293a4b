"""The generated pages are those that the code gives now."""

import pytest

from jobs.cli.help import complete
from jobs.cli.parse import GROUPS
from tests.docs import reference

_VERBS = [verb for verbs in GROUPS.values() for verb in verbs]


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    assert (reference.FOLDER / name).read_text() == reference.PAGES[name](), f"{name} is stale\nhint: make reference"


@pytest.mark.parametrize("verb", ["shard", "pipeline", "sample", "submit"])
def test_the_page_has_every_flag_that_the_help_has(verb: str) -> None:
    flags = reference.flags_of(verb)
    assert {flag.name for flag in flags if flag.name.startswith("--")} == {
        *complete([verb, "--"])} - {"--help", "--help-all"}


def test_every_flag_and_setting_has_a_text() -> None:
    assert not [f"{verb} {flag.name}" for verb in _VERBS for flag in reference.flags_of(verb) if not flag.meaning]
    assert "|  |\n" not in reference.settings_page().partition("## Recipes")[0]
