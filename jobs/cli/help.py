"""The help of the program and of its verbs, and shell completion."""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jobs.cli.verbs import GROUPS, PROGRAM_FLAGS, VERBS, default_options, load_verb
from jobs.config.field_docs import field_docs
from jobs.telemetry import output
from jobs.telemetry.output import PROGRAM

SHELLS = {
    "bash": '_rdm() { mapfile -t COMPREPLY < <(rdm --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); }\n'
            "complete -o default -F _rdm rdm\n",
    "zsh": "#compdef rdm\n"
           '_rdm() { local -a words_found=("${(@f)$(rdm --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")\n'
           '  if [[ -n "$words_found" ]]; then compadd -a words_found; else _files; fi }\n'
           "compdef _rdm rdm\n",
    "fish": 'complete -c rdm -a "(rdm --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)"\n',
}
"""For each shell the script that completes `rdm`. The shell asks the program for the words at each press of Tab."""

# The command that makes the folder of a stage again, as Stage.replacement has it. Quoted words have any character.
_REPLACING = re.compile(r"(?:^|(?<=replace this one: ))python -m jobs (?P<verb>\w+) (?P<target>\S+)"
                        r"(?: '[^'\n]*'| (?!python -m )[^\s;,']+)*? --overwrite\b(?: --root (?:'[^'\n]*'|[^\s;,)]+))?")
_NAME_DATASETS = {"--dataset", "--database", "--validation", "--extend"}
_RUN_FLAG = "--train"
_NAME_RUNS = {"train", "sample", "evaluate", "export"}  # verbs
_UNWRAPPED = 1000  # columns where no terminal has a width
_ON_WORKERS = {"shard", "embed", "score", "index", "neighbors", "latents", "train", "sample", "evaluate", "rebuild",
               "style", "pipeline", "demo", "plan"}
_USED_BY = {
    "ClusterConfig": {
        **{name: {"train", "pipeline", "demo"} for name in ("min_workers", "resize_every", "max_failures")},
        "decoders": {"embed", "pipeline", "rebuild", "style", "demo"},
        "gpus": {*VERBS} - {"shard", "index"}},
    "CommonOptions": {
        "local": _ON_WORKERS,
        **dict.fromkeys(("recipe", "config"), _ON_WORKERS | {"search"}),
        "root": {*VERBS} - {"init"},
        "dry_run": {*VERBS} - {"status", "versions", "search", "ls", "show", "recipes", "init", "doctor"}},
}
"""Flags that several verbs parse and only some use."""

_USUAL = {
    "ShardConfig": "source kind captions where samples_per_shard image_size resize format duplicates",
    "DownloadConfig": "",
    "EmbedConfig": "model pretrained batch_size",
    "IndexConfig": "max_memory key min_recall",
    "NeighborsConfig": "k method",
    "TrainConfig": "steps global_batch lr k image_size checkpoint_every log_every validate_every",
    "UNetConfig": "", "DiffusionConfig": "",
    "SampleConfig": "k guidance seed steps sampler",
    "QueryConfig": "unconditional count",
    "EvaluateConfig": "prompts seeds ways",
    "RebuildConfig": "full keep", "GatesConfig": "min_recall max_lost max_failed min_overlap", "SigningOptions": "sign",
    "PlanConfig": "pictures database_rows workers gpus measure price_gpu_hour json",
    "ClusterConfig": "workers gpus",
    "CommonOptions": "root recipe config local dry_run",
    "StageOptions": "overwrite", "TextStageOptions": "overwrite json",
}
"""The flags in the short help. Classes that are not here are shown whole."""
_PIPELINE_USUAL = {"ShardConfig": "source where image_size", "EmbedConfig": "model",
                   "IndexConfig": "", "NeighborsConfig": "k", "TrainConfig": "steps global_batch image_size"}


def print_overview() -> None:
    """Print the verbs by group."""
    lines = [f"usage: {PROGRAM} VERB [...]; {PROGRAM} VERB --help"]
    for group, verbs in GROUPS.items():
        lines += ["", group, *(f"  {verb:<10} {_summary(load_verb(verb)[0])}" for verb in verbs)]
    lines += ["", "Every verb takes --root (a folder or s3://...).",
              "To resume after any fault, run the same command again.",
              f"--version prints the version. --completion {'|'.join(SHELLS)} prints a script for the shell, as in",
              f'  eval "$({PROGRAM} --completion bash)"']
    columns = shutil.get_terminal_size((_UNWRAPPED, 24)).columns
    output.print_text("\n".join(textwrap.fill(
        line, columns, subsequent_indent=" " * (13 if line.startswith("  ") else 2), replace_whitespace=False,
        break_long_words=False, break_on_hyphens=False) for line in lines))


def is_used(verb: str, kind: type, name: str) -> bool:
    """Whether a verb uses a flag of an options class that several verbs parse."""
    return verb in _USED_BY.get(kind.__name__, {}).get(name, VERBS)


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def print_help(verb: str, *, everything: bool = False) -> None:
    """Print the flags of a verb that it uses, the usual ones or all, and its examples."""
    hidden = _print_flags(verb, everything=everything)
    examples: tuple[str, ...] = load_verb(verb)[0].examples  # type: ignore[attr-defined]
    more = f"{hidden} more flags: {PROGRAM} {verb} --help-all\n\n" if hidden else ""
    output.print_text(more + "\n  ".join(["Examples:", *(f"{PROGRAM} {example}" for example in examples)]))


def _print_flags(verb: str, *, everything: bool) -> int:
    """Print the flags of a verb. Returns the number of flags that are left out."""
    import tyro
    kind = load_verb(verb)[0]
    trimmed = _Trimmed(verb, everything=everything)
    shown_type, shown_default = trimmed.trim(kind, default_options(kind, []))
    with contextlib.suppress(SystemExit):  # tyro ends the program after the help
        tyro.cli(shown_type, args=["--help"], default=shown_default, prog=f"{PROGRAM} {verb}")
    return trimmed.hidden


class _Trimmed:
    """Copies of options classes that hide flags in the help."""

    def __init__(self, verb: str, *, everything: bool) -> None:
        self.verb, self.everything = verb, everything
        self.hidden = 0
        """Flags that only the full help shows."""

    def trim(self, kind: type, value: Any) -> tuple[type, Any]:
        """A subclass that hides flags, and the value as an object of it."""
        import tyro
        hints = get_type_hints(kind, include_extras=True)
        changed: list[tuple[str, Any]] = []
        values = dict(vars(value))
        for field in fields(kind):
            hint = hints[field.name]
            bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            if not is_used(self.verb, kind, field.name):
                changed.append((field.name, Annotated[hint, tyro.conf.Suppress]))
            elif is_dataclass(bare) and isinstance(bare, type) and _has_flags(hint):
                inner, values[field.name] = self.trim(bare, values[field.name])
                extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
                changed.append((field.name, Annotated[inner, *extras] if extras else inner))
            elif not self._is_usual(kind, field.name):
                self.hidden += 1
                changed.append((field.name, Annotated[hint, tyro.conf.Suppress]))
            elif text := field_docs(kind).get(field.name):  # tyro would keep the line breaks of the source
                changed.append((field.name, Annotated[hint, tyro.conf.arg(help=text)]))
        trimmed = make_dataclass(kind.__name__, changed, bases=(kind,), frozen=True, kw_only=True,
                                 namespace={"__doc__": kind.__doc__})
        copy: Any = object.__new__(trimmed)  # its fields were checked when the value was made
        copy.__dict__.update(values)
        return trimmed, copy

    def _is_usual(self, kind: type, name: str) -> bool:
        table = _USUAL | (_PIPELINE_USUAL if self.verb in {"pipeline", "rebuild", "style"} else {})
        return self.everything or kind.__name__ not in table or name in table[kind.__name__].split()


def _has_flags(hint: Any) -> bool:
    """Whether the section has flags; those of `Unflagged` have none."""
    import tyro
    return get_origin(hint) is not Annotated or tyro.conf.Fixed not in get_args(hint)[1:]


def list_flags(verb: str) -> set[str]:
    """The flags of a verb."""
    return {*re.findall(r"^\W*?(--[a-z][\w.-]*)", _help_text(verb), re.MULTILINE), "--help", "--help-all"}


def _help_text(verb: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        _print_flags(verb, everything=True)
    return text.getvalue()


def fit_flags(text: str, verb: str) -> str:
    """An error whose hint spells flags as the verb has them: --embed.model of `pipeline` is --model of `embed`.

    Flags of commands that a hint spells in full stay as they are.
    """
    message, mark, hint = text.partition("\nhint: ")
    if verb not in VERBS or not re.search(r"(?<![\w-])--[a-z]", hint):
        return text
    flags = list_flags(verb)

    def fit(match: re.Match[str]) -> str:
        flag, short = match[0], f"--{match[0].rpartition('.')[2].removeprefix('--')}"
        longer = [known for known in flags if known.endswith(f".{flag.removeprefix('--')}")]
        if flag in flags:
            return flag
        return short if short in flags else longer[0] if len(longer) == 1 else flag

    parts = re.split(r"(python -m jobs (?:(?!; |\n|, or ).)*)", hint)
    parts[::2] = [re.sub(r"(?<![\w-])--[a-z][\w.-]*[\w]", fit, part) for part in parts[::2]]
    return message + mark + "".join(parts)


def repeat_command(text: str, arguments: Sequence[str]) -> str:
    """An error whose hint replaces the folder of this command by the command as the user typed it, with all flags.

    Code below the command line knows the name of a stage and its inputs, and none of the settings that were typed.
    """
    message, mark, hint = text.partition("\nhint: ")
    typed = shlex.join(["python", "-m", "jobs", *(word for word in arguments if word != "--overwrite")])

    def repeat(match: re.Match[str]) -> str:
        return f"{typed} --overwrite" if [match["verb"], match["target"]] == list(arguments[:2]) else match[0]

    return message + mark + _REPLACING.sub(repeat, hint)


def complete(words: Sequence[str]) -> list[str]:
    """Completions of the last word: verbs, flags of the verb and their values, datasets or runs of a local root.

    None where the value of a flag is text or a file: the shell then completes files.
    """
    *before, current = [word for word in words if word != "="] or [""]  # bash splits --root=ROOT into three words
    if words[-1:] == ["="]:
        before, current = [*before, current], ""
    named = [word for word in before if word in VERBS]
    verb = "".join(named[1:2] if named[:1] == ["submit"] else named[:1])  # the words of `submit` are another command
    previous = before[-1] if before else ""
    if named and current.startswith("-"):
        found = sorted(list_flags(verb or "submit"))
    elif not verb:
        found = [*VERBS] if named else [*VERBS, *PROGRAM_FLAGS]
    elif previous == "--recipe":
        from jobs.config.recipes import RECIPES  # the settings of all networks, which no help needs
        found = [*RECIPES]
    elif previous.startswith("--") and previous not in {*_NAME_DATASETS, _RUN_FLAG} and (
            values := _values_of(verb, previous)):
        found = [] if values == ["STR"] else values
    else:
        is_run = previous == _RUN_FLAG or (verb in _NAME_RUNS and previous not in _NAME_DATASETS)
        folder = Path(_root_of(before)).expanduser() / ("runs" if is_run else "datasets")
        found = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [word for word in found if word.startswith(current)]


def _root_of(words: Sequence[str]) -> str:
    """The root that words of a command line name."""
    pairs = [*itertools.pairwise(words), *(word.split("=", 1) for word in words if word.startswith("--root="))]
    return next((root for flag, root in pairs if flag == "--root"), output.DEFAULT_ROOT)


def _values_of(verb: str, flag: str) -> list[str]:
    """The values that a flag may have, or the name of their type. Empty if it has none, as those of yes or no."""
    match = re.search(rf"{re.escape(flag)} (?:\{{(.+?)\}}|\[?([A-Z]+))", _help_text(verb))
    return ([*match[1].split(",")] if match[1] else ["STR"]) if match else []
