"""The verbs: their names, groups, options and defaults. Imports only the module of the verb that is loaded."""

import argparse
import difflib
import importlib
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from jobs.cli.options import CommonOptions, StageOptions
from jobs.telemetry.output import PROGRAM

if TYPE_CHECKING:
    from jobs.config.settings import Settings

Run = Callable[[Any], int]
"""The function of a verb: from its options to the exit code."""
Change = Callable[["Settings"], "Settings"]
VERBS = {**dict.fromkeys(("shard", "embed", "score", "index", "neighbors", "latents"), "data"),
         **dict.fromkeys(("convert", "export", "train", "sample", "evaluate"), "model"),
         **dict.fromkeys(("rebuild", "style", "versions", "rollback", "repair", "gc", "credits", "forget"),
                         "publish"),
         **dict.fromkeys(("search", "report", "status", "verify", "plan", "recipes"), "inspect"),
         **dict.fromkeys(("show", "ls", "rm"), "everyday.root"),
         **dict.fromkeys(("init", "doctor"), "everyday.setup"),
         **{verb: verb for verb in ("pipeline", "demo", "submit")}}
"""The verbs, and the module of each: `VERB` has the class `VerbOptions` and the function `run_VERB`."""
GROUPS = {"build": ("demo", "style", "recipes", "pipeline", "shard", "embed", "score", "index", "neighbors", "latents"),
          "train": ("train", "evaluate", "convert", "export"),
          "sample": ("search", "sample", "credits"),
          "publish": ("rebuild", "versions", "rollback", "repair", "gc", "forget", "rm"),
          "watch": ("ls", "show", "status", "report", "verify"),
          "operate": ("init", "doctor", "submit", "plan")}
"""The verbs by purpose, as the help lists them."""
PROGRAM_FLAGS = ("--help", "--help-all", "--version", "--completion")
"""The flags that stand in place of a verb."""


def load_verb(verb: str) -> tuple[type, Run]:
    """The options class and the function of a verb. Imports only the module of the verb."""
    if verb not in VERBS:
        kind, known = ("flag", PROGRAM_FLAGS) if verb.startswith("-") else ("verb", VERBS)
        close = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
        if kind == "flag" and not close:
            hint = f"a verb comes before its flags: {PROGRAM} --help"
        raise ValueError(f"there is no {kind} {verb!r}\nhint: {hint}")
    module = importlib.import_module(f"jobs.cli.{VERBS[verb]}")
    return getattr(module, f"{verb.capitalize()}Options"), getattr(module, f"run_{verb}")


def default_options(kind: type, flags: list[str], change: Change | None = None) -> Any:
    """The options before the flags: settings from the recipe and the file, and the defaults of the rest.

    `change` replaces settings of the recipe if the command names none.
    """
    import tyro

    from jobs.config.toml import resolve_sections
    names = {field.name for field in fields(kind)}
    values: dict[str, Any] = {"common": CommonOptions(), "stage": get_type_hints(kind).get("stage", StageOptions)()}
    if "common" in names:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--recipe", default="")
        first.add_argument("--config", default="")
        known, _ = first.parse_known_args(flags)
        values |= resolve_sections(known.recipe, known.config, names, getattr(kind, "default_recipe", "tiny"), change)
    for field in fields(kind):
        if field.name not in values:
            values[field.name] = (field.default if field.default is not MISSING else field.default_factory()
                                  if field.default_factory is not MISSING else tyro.MISSING)
    return kind(**{field.name: values[field.name] for field in fields(kind)})
