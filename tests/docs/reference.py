"""Writes the pages of docs/reference/ that come from the code: verbs, settings.

    PYTHONPATH=. .venv/bin/python tests/docs/reference.py      # `make reference`
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import inf
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from jobs.cli.help import is_used
from jobs.cli.verbs import GROUPS, default_options, load_verb
from jobs.config.field_docs import field_docs
from jobs.config.recipes import RECIPES
from jobs.config.settings import Settings
from jobs.config.toml import resolve_settings

sys.path.insert(0, str(Path(__file__).parent))  # the module beside this one, also when this file runs alone

from errors import errors_page

FOLDER = Path(__file__).parents[2] / "docs/reference"
_GENERATED = "<!-- `make reference` writes this page from the code. -->\n\n"
_VERBS_HEAD = """# Verbs

A verb is the first word after `python -m jobs` or `rdm`. `rdm VERB --help` shows its usual flags.
`--help-all` shows all flags.
A flag of yes or no has a second form: `--no-local` undoes `--local`.

## Flags that verbs share

At its end, the section of a verb names the flags of this table that the verb has.
"""
_SETTINGS_HEAD = """# Settings

A recipe gives all settings. A TOML file (`--config FILE.toml`) overrides the recipe, and flags override the file.
The defaults on this page are those of the recipe `tiny`. A heading of this page is a section of the file:

```toml
recipe = "tiny"

[train]
steps = 20000

[train.unet]
model_channels = 96

[cluster]
workers = 8
gpus = 1
```
"""
_SHARED = {"common", "stage"}
_BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


@dataclass(frozen=True)
class Flag:
    """One flag of a verb. `section` names the settings that it belongs to, or is empty."""

    name: str
    section: str
    kind: str
    default: str
    meaning: str


def type_text(hint: Any) -> str:
    """The text for a type, with its bounds."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [_BOUNDS[key].format(f"{limit:g}") for each in parts[1:] if is_dataclass(each)
                  and type(each).__module__ == "annotated_types"
                  for key, limit in asdict(each).items() if key in _BOUNDS and limit not in (None, inf)]  # type: ignore[call-overload]
        return ", ".join([type_text(parts[0]), *bounds])
    if origin is Literal:
        return " ".join(f"`{part}`" if part else "empty" for part in parts)
    if origin is tuple:
        return f"list of {type_text(parts[0])}" if parts[-1] is ... else " and ".join(type_text(part) for part in parts)
    if parts:
        return " or ".join("none" if part is NoneType else type_text(part) for part in parts)
    return {str: "text", bool: "yes or no", int: "integer", float: "number"}[hint]


def value_text(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "" or value == () or type(value).__module__.startswith("tyro"):
        return ""
    return ", ".join(f"`{each}`" for each in (value if isinstance(value, tuple) else (value,)))


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())


def flags_of(verb: str) -> list[Flag]:
    """The flags of a verb in the order of its help."""
    kind = load_verb(verb)[0]
    return list(_flags(verb, kind, default_options(kind, []), prefix="", section="", flat=False))


def _flags(verb: str, kind: type, value: Any, *, prefix: str, section: str, flat: bool) -> Iterator[Flag]:
    hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    for field in fields(kind):
        hint, extras = _bare(hints[field.name])
        if not is_used(verb, kind, field.name) or tyro.conf.Fixed in extras:
            continue
        if is_dataclass(hint) and isinstance(hint, type):
            inner_flat = flat or tyro.conf.OmitArgPrefixes in extras
            yield from _flags(verb, hint, getattr(value, field.name), flat=inner_flat,
                              prefix=prefix if inner_flat else f"{prefix}{field.name}.",
                              section=f"{section}.{field.name}" if section else field.name)
            continue
        arguments = next((each for each in extras if hasattr(each, "metavar")), None)
        name = (getattr(arguments, "name", None) or field.name).replace("_", "-")
        shown = f"--{prefix.replace('_', '-')}{name}"
        if tyro.conf.Positional in extras:
            shown = getattr(arguments, "metavar", None) or field.name.upper()
        meaning = docs.get(field.name) or getattr(arguments, "help", None) or ""
        yield Flag(shown, section, type_text(hints[field.name]), value_text(getattr(value, field.name)), meaning)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(flags: list[Flag], head: str) -> list[str]:
    rows = [f"| `{flag.name}` | {_cell(flag.kind)} | {_cell(flag.default)} | {_cell(flag.meaning)} |" for flag in flags]
    return [f"| {head} | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def verbs_page() -> str:
    """docs/reference/verbs.md."""
    known = {field.name for field in fields(Settings)}
    lines = [_VERBS_HEAD]
    shared: dict[str, Flag] = {}
    for verbs in GROUPS.values():
        for verb in verbs:
            shared = {flag.name: flag for flag in flags_of(verb) if flag.section in _SHARED} | shared
    lines += _table(list(shared.values()), "flag")
    for group, verbs in GROUPS.items():
        lines += [f"## To {group}", ""]
        for verb in verbs:
            kind, flags = load_verb(verb)[0], flags_of(verb)
            examples: tuple[str, ...] = kind.examples  # type: ignore[attr-defined]
            lines += [f"### {verb}", "", inspect.cleandoc(kind.__doc__ or ""), "",
                      *(f"    python -m jobs {example}" for example in examples), ""]
            common = [flag for flag in flags if flag == shared.get(flag.name)]  # evaluate has another --json
            own = [flag for flag in flags if flag not in common and flag.section.partition(".")[0] not in known]
            if own:
                lines += _table(own, "argument or flag")
            lines += _settings_of_verb([flag for flag in flags if flag.section.partition(".")[0] in known])
            names = ", ".join(f"`{flag.name}`" for flag in common)
            lines += [f"Shared flags: {names or 'none'}.", ""]
    return _GENERATED + "\n".join(lines)


def _settings_of_verb(flags: list[Flag]) -> list[str]:
    lines = []
    for section in dict.fromkeys(flag.section for flag in flags):
        names = ", ".join(f"`{flag.name}`" for flag in flags if flag.section == section)
        lines.append(f"* [Settings of `{section}`](settings.md#{section.replace('.', '')}): {names}")
    return [*lines, ""] if lines else []


def settings_page() -> str:
    """docs/reference/settings.md."""
    lines = [_SETTINGS_HEAD]
    settings = resolve_settings("", "")
    for field in fields(Settings):
        lines += _section(field.name, getattr(settings, field.name))
    names = list(RECIPES)
    lines += ["## Recipes", "", "Settings that differ between recipes.", "",
              *(f"* `{name}`: {inspect.cleandoc(recipe.__doc__ or '')}" for name, recipe in RECIPES.items()), "",
              f"| setting | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    columns = [dict(_values("", recipe())) for recipe in RECIPES.values()]
    lines += [f"| `{name}` | {' | '.join(value_text(column[name]) for column in columns)} |" for name in columns[0]
              if any(column[name] != columns[0][name] for column in columns)]
    return _GENERATED + "\n".join([*lines, ""])


def _section(path: str, section: Any) -> list[str]:
    kind = type(section)
    hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    plain = [field for field in fields(kind) if not is_dataclass(getattr(section, field.name))]
    rows = [Flag(field.name, path, type_text(hints[field.name]), value_text(getattr(section, field.name)),
                 docs.get(field.name, "")) for field in plain]
    lines = [f"## {path}", "", inspect.cleandoc(kind.__doc__ or ""), "", *_table(rows, "setting")]
    for field in fields(kind):
        if is_dataclass(inner := getattr(section, field.name)):
            lines += _section(f"{path}.{field.name}", inner)
    return lines


def _values(path: str, section: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value, name = getattr(section, field.name), f"{path}.{field.name}".strip(".")
        if is_dataclass(value):
            yield from _values(name, value)
        else:
            yield name, value


PAGES = {"verbs.md": verbs_page, "settings.md": settings_page, "errors.md": errors_page}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
