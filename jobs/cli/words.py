"""The words after a verb, before they are parsed: a flag that is repeated, and a path that is empty."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

_PATHS = frozenset({"root", "source", "config", "checkpoint", "out", "adopt", "image", "prompts", "tombstone", "sheet",
                    "sign", "rates", "measure", "from"})
"""Flags whose value is a path. An empty one would be the working folder, or count as no flag."""
_TAKES_ONE = (tyro.conf.UseAppendAction, tyro.conf.Positional)


def join_repeated(kind: type, words: Sequence[str]) -> list[str]:
    """The words with each flag of several values named once: `--source A --source B` becomes `--source A B`.

    tyro would keep the values of the last one.
    """
    typed = _split(words)
    names = [name for group in typed if (name := _name_of(group[0]))]
    if len({*names}) == len(names):
        return list(words)
    several = _find_flags_of_several(kind)
    groups: list[list[str]] = []
    for group in typed:
        name = _name_of(group[0])
        earlier = next((other for other in groups if name.rpartition(".")[2] in several and _name_of(other[0]) == name),
                       None)
        if earlier:  # the last place: tyro leaves a name at the end of the words to the verb
            groups.remove(earlier)
        if earlier and (len(group) > 1 or "=" in group[0]):  # without a value it empties the list
            group = [*earlier, *([group[0].partition("=")[2]] if "=" in group[0] else []), *group[1:]]
        groups.append(group)
    return [word for group in groups for word in group]


def refuse_empty_paths(words: Sequence[str]) -> None:
    """ValueError if the value of a flag that takes a path is empty, as that of an unset variable of the shell."""
    for group in _split(words):
        name = _name_of(group[0])
        if name.rpartition(".")[2] in _PATHS and ("" in group[1:] or group[0].endswith("=")):
            flag = group[0].partition("=")[0]
            raise ValueError(f"{flag} '' names nothing: expected a path, got an empty word\n"
                             f"hint: {flag} PATH, or no {flag}; a variable of the shell may be unset")


def _split(words: Sequence[str]) -> list[list[str]]:
    """The words in groups: each flag with the words up to the next one. Everything from `--` on is one group."""
    groups: list[list[str]] = []
    for word in words:
        is_flag = word == "--" or (word.startswith("--") and word[2:3].isalpha())  # -inf is a value
        if groups and (groups[-1][0] == "--" or not is_flag):
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _name_of(word: str) -> str:
    """The name of a flag as its field has it; "" for another word."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else ""


def _find_flags_of_several(kind: type) -> set[str]:
    """The fields of an options class, and of its sections, whose flag takes any number of values."""
    names = set()
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(inner) and isinstance(inner, type):
            names |= _find_flags_of_several(inner)
        elif get_origin(inner) is tuple and get_args(inner)[-1:] == (Ellipsis,) and not _takes_one(marks):
            names.add(name)
    return names


def _takes_one(marks: Sequence[Any]) -> bool:
    return any(mark in marks for mark in _TAKES_ONE)
