"""The generated pages are those that the code gives now."""

import pytest

from jobs.cli.help import complete
from jobs.cli.verbs import GROUPS
from tests.docs import errors, reference

_VERBS = [verb for verbs in GROUPS.values() for verb in verbs]


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    assert (reference.FOLDER / name).read_text() == reference.PAGES[name](), f"{name} is stale\nhint: make reference"


@pytest.mark.parametrize("verb", ["shard", "pipeline", "sample", "submit"])
def test_the_page_has_every_flag_that_the_help_has(verb: str) -> None:
    flags = reference.flags_of(verb)
    assert {flag.name for flag in flags if flag.name.startswith("--")} == {
        *complete([verb, "--"])} - {"--help", "--help-all"}


def test_a_verb_with_another_meaning_of_a_shared_flag_lists_it() -> None:
    _, _, section = reference.verbs_page().partition("### evaluate\n")
    section = section.partition("\n### ")[0]
    assert "| `--json` | yes or no | no | Print JSON instead of text" in section
    assert "`--json`" not in section.partition("Shared flags: ")[2]


def test_every_flag_and_setting_has_a_text() -> None:
    assert not [f"{verb} {flag.name}" for verb in _VERBS for flag in reference.flags_of(verb) if not flag.meaning]
    assert "|  |\n" not in reference.settings_page().partition("## Recipes")[0]


def test_every_error_message_has_a_cure() -> None:
    messages = errors.find_messages()
    assert len(messages) > 500 and any(message.text.startswith("no index of COUNT vectors") for message in messages)
    wrong = [f"{message.place}: {message.text}" for message in messages if not message.cure]
    assert not wrong, "no hint in the code, and no entry in tests/docs/cures.toml:\n" + "\n".join(wrong)


def test_every_warning_has_a_cure() -> None:
    warnings = errors.find_warnings()
    assert len(warnings) > 50 and any(warning.text.startswith("corpus: synthetic images") for warning in warnings)
    wrong = [f"{warning.place}: {warning.text}" for warning in warnings if not warning.cure]
    assert not wrong, "no hint in the code, and no entry in tests/docs/cures.toml:\n" + "\n".join(wrong)


def test_every_entry_of_the_cures_belongs_to_a_message() -> None:
    messages = errors.find_messages()
    texts, areas = [message.text for message in messages], {message.area for message in messages}
    assert [start for start in errors.CURES["messages"] if not any(text.startswith(start) for text in texts)] == []
    assert [said for said, _ in errors.CURES["built"].values() if said not in texts] == []
    warnings = [warning.text for warning in errors.find_warnings()]
    assert [start for start in errors.CURES["warnings"] if not any(text.startswith(start) for text in warnings)] == []
    assert set(errors.CURES["areas"]) == areas
