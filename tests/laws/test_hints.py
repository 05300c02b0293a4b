"""Every command in a text of the source names a verb, and only flags that this verb has."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from jobs.cli.help import complete
from jobs.cli.verbs import VERBS

_ROOT = Path(__file__).parents[2]
_COMMAND = re.compile(r"python -m jobs (\w+)((?:(?!; |\n|`|\)|, or |python -m jobs ).)*)")


def _texts() -> Iterator[tuple[str, str]]:
    """Each text of the source, as `file:line` and with \\0 for what is filled in."""
    for package in ("jobs", "pipeline", "model"):
        for file in sorted((_ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                text = "".join(part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "\0"
                               for part in parts)
                if len(text) > 1:
                    yield f"{file.relative_to(_ROOT)}:{getattr(node, 'lineno', 0)}", text


@lru_cache
def _flags(verb: str) -> set[str]:
    return {*complete([verb, "--"])}


def test_commands_in_texts_have_verbs_and_flags() -> None:
    wrong, seen = [], 0
    for place, text in _texts():
        for verb, rest in _COMMAND.findall(text):
            if verb in {"VERB", "submit"}:
                continue
            seen += 1
            unknown = [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest) if verb in VERBS
                       and flag not in _flags(verb)]
            if verb not in VERBS or unknown:
                wrong.append((place, verb, unknown))
    assert not wrong and seen > 50


def test_a_flag_alone_in_a_hint_belongs_to_a_verb() -> None:
    known = set().union({"--completion", "--help-all"}, *map(_flags, VERBS))
    hints = [(place, re.split(r"\n|python -m|pip install", hint)[0])
             for place, text in _texts() for hint in text.split("hint: ")[1:]]
    wrong = [(place, flag) for place, hint in hints
             for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", hint) if flag not in known]
    assert not wrong
