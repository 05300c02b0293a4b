"""Settings from a TOML file over a recipe."""

import difflib
import re
import tomllib
import typing
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any

from jobs.config.recipes import RECIPES
from jobs.config.settings import Settings
from pipeline import storage

# tomllib takes memory by the square of the number of parts.
_LONG_KEY = re.compile(r"""^[ \t]*\[*[ \t]*[\w"'-]+(?:[ \t]*\.[ \t]*[\w"'-]+){20}""", re.MULTILINE)


def resolve_settings(recipe: str, file: str) -> Settings:
    """All settings: the recipe's, overridden by a TOML file. The file may name the recipe itself.

    ValueError for an unknown key in the file, and for a value of another type.
    """
    settings, document = _read(recipe, file)
    return override(settings, document, file)


def resolve_sections(recipe: str, file: str, names: Collection[str], default: str = "tiny",
                     change: Callable[[Settings], Settings] | None = None) -> dict[str, Any]:
    """Only the sections `names`, like `resolve_settings`. The name `settings` stands for all of them.

    `default` is the recipe if none is named; then `change` replaces some of its settings. Other sections of the file
    are not read, but a setting that does not exist is a ValueError there too.
    """
    settings, document = _read(recipe, file, default, change)
    if "settings" not in names:
        for name in {field.name for field in fields(settings)} & document.keys() - set(names):
            _check_names(settings, {name: document.pop(name)}, file)
    settings = override(settings, document, file)
    return {"settings": settings} | {field.name: getattr(settings, field.name) for field in fields(settings)
                                     if field.name in names}


def _read(recipe: str, file: str, default: str = "tiny", change: Callable[[Settings], Settings] | None = None
          ) -> tuple[Settings, dict[str, Any]]:
    """The settings of the recipe, and the sections of the file."""
    document: dict[str, Any] = {}
    if file:
        try:
            text = storage.read_small_file(file).decode()
            if _LONG_KEY.search(text):
                raise ValueError("a key of more than 20 parts")
            document = tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"cannot read the settings {file}: {error.strerror}\n"
                             "hint: correct the path of --config") from None
        # Also text that is not UTF-8, numbers of thousands of digits, thousands of brackets.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not TOML: {error}\nhint: correct this line") from None
    named = recipe or document.get("recipe", "")
    name = recipe or document.pop("recipe", default)
    document.pop("recipe", None)
    if not isinstance(name, str) or name not in RECIPES:
        where = f"{file}: " if file and not recipe else ""
        raise ValueError(f"{where}there is no recipe {name!r}\nhint: {suggest_name(name, RECIPES)}")
    settings = RECIPES[name]()
    return change(settings) if change and not named else settings, document


def suggest_name(name: object, names: Collection[str]) -> str:
    """A hint for a name that is not there: the one that is spelled like it, or else all."""
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]}?" if close else f"here are {', '.join(names)}"


def override(section: Any, values: dict[str, Any], where: str) -> Any:
    """A section of settings with other values, as TOML or JSON has them; ValueError with the place `where`."""
    types = typing.get_type_hints(type(section))
    changes = {}
    _check_names(section, values, where)
    for name, value in values.items():
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a section: write [{name}] and its settings below")
            changes[name] = override(current, value, f"{where}: {name}")
        else:
            changes[name] = _parse_value(types[name], value, f"{where}: {name}")
    try:
        return replace(section, **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_names(section: Any, values: dict[str, Any], where: str) -> None:
    """ValueError for a setting that does not exist, in a section or in those below it."""
    names = {field.name: getattr(section, field.name) for field in fields(section)}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{where}: there is no setting {name!r}\nhint: {suggest_name(name, sorted(names))}")
        if is_dataclass(names[name]) and isinstance(value, dict):
            _check_names(names[name], value, f"{where}: {name}")


def _parse_value(kind: Any, value: Any, where: str) -> Any:
    """A TOML value as the type that the setting has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} = {value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} = {value!r}: must be a list")
        return tuple(_parse_value(arguments[0], each, where) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(origin, UnionType) and type(value) is not kind:
        raise ValueError(f"{where} = {value!r}: must be of the type {kind.__name__}")
    return value
