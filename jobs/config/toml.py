"""Settings from a TOML file over a recipe."""

import tomllib
import typing
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from jobs.config.recipes import RECIPES
from jobs.config.settings import Settings


def resolve_settings(recipe: str, file: str) -> Settings:
    """The settings of a recipe as a TOML file overrides them; the file may name the recipe itself.

    ValueError naming the key of the file that no setting has, or whose value has another type.
    """
    document: dict[str, Any] = {}
    if file:
        try:
            document = tomllib.loads(Path(file).read_text())
        except OSError as error:
            raise ValueError(f"cannot read the settings {file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not TOML: {error}") from None
    chosen = recipe or document.pop("recipe", "tiny")
    document.pop("recipe", None)
    if not isinstance(chosen, str) or chosen not in RECIPES:
        raise ValueError(f"there is no recipe {chosen!r}\nhint: {', '.join(RECIPES)}")
    return _overridden(RECIPES[chosen](), document, file)


def _overridden(section: Any, values: dict[str, Any], where: str) -> Any:
    types = typing.get_type_hints(type(section))
    changes = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: there is no setting {name!r}\nhint: here are {', '.join(sorted(types))}")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a section: write [{name}] and its settings below")
            changes[name] = _overridden(current, value, f"{where}: {name}")
        else:
            changes[name] = _typed(types[name], value, f"{where}: {name}")
    return replace(section, **changes)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A TOML value as the type that the setting has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} = {value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} = {value!r}: must be a list")
        return tuple(_typed(arguments[0], each, where) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(origin, UnionType) and type(value) is not kind:
        raise ValueError(f"{where} = {value!r}: must be of the type {kind.__name__}")
    return value
