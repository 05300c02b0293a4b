"""Parse the options of one verb. Imports only the module of that verb."""

import contextlib
import difflib
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jobs.checks.place import FOLDERS, SHOWN_NAMES, check_new_root, other_files, roots_below
from jobs.cli.help import list_flags
from jobs.cli.verbs import GROUPS, VERBS, Change, Run, default_options, load_verb
from jobs.cli.words import join_repeated, refuse_empty_paths
from jobs.telemetry.output import PROGRAM
from pipeline import storage

if TYPE_CHECKING:
    from pipeline.datasets.dataset import Dataset

_log = logging.getLogger(__name__)
_READ_A_SOURCE = {"style", "rebuild", "pipeline"}
"""Verbs that need a source."""
_READ_A_ROOT = {"embed", "score", "index", "neighbors", "latents", "train", "evaluate", "export", "search", "sample",
                "versions", "rollback", "repair", "gc", "forget", "verify", "report", "show", "rm", "ls", "status"}
"""Verbs that need a root with a dataset or a run."""
_MAKES_A_ROOT = {"demo", "style", "pipeline", "shard", "rebuild", "convert"}
"""Verbs that make a root where there is none."""
_READ_A_RUN = {"evaluate", "export"}
"""Verbs that need a run. `sample` checks its run itself, because its first word may be a prompt."""
ABOUT_ALL_VERSIONS = {"rebuild": " --source SOURCE", "style": " --source SOURCE", "rollback": " --to {}",
                      "gc": " --keep 3", "versions": "", "repair": ""}
"""Verbs that take no version of a dataset, and what follows the name in their hint."""
_FILES = ("image", "prompts", "tombstone", "adopt", "checkpoint")
"""Flags with the path of a file or folder to read, of the verbs where their values are texts."""
_WRITTEN = {"export": "out", "show": "out", "search": "sheet", "credits": "sheet"}
"""The flag with the path of a file or folder that a verb writes, always on this machine."""
LOOK = {*GROUPS["watch"], "search", "versions"}
"""Verbs that only read, for a user who waits. The others repeat requests to a store for minutes."""
STORE_ANSWER_S = 30.0
"""Seconds within which a store must answer the first request of the verbs that only read."""
_OLD_FLAGS = {f"--{old}": f"--{new}" for old, new in (("rebuild", "overwrite"), ("no-rebuild", "no-overwrite"))}


def parse_command(arguments: Sequence[str], *, read_root: bool = False,
                  check: Callable[[str, Any], None] | None = None) -> tuple[Run, Any]:
    """The function of a verb, and its options. ValueError if there is no such verb.

    `read_root`: settings that the command does not name are those of the published version, for verbs that make the
    next one. `check` gets the verb and the options before that.
    """
    verb, flags = arguments[0], list(arguments[1:])
    kind, run = load_verb(verb)
    if verb == "submit":
        flags.insert(len(flags_of(verb, flags)), "--")
    elif "stage" in {field.name for field in fields(kind)}:
        flags = [_OLD_FLAGS.get(flag, flag) for flag in flags]
    refuse_empty_paths(flags)
    flags = join_repeated(kind, flags)
    import tyro

    def parse(change: Change | None = None) -> Any:
        return tyro.cli(kind, args=flags, default=default_options(kind, flags, change), prog=f"{PROGRAM} {verb}")

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            options = parse()
        except SystemExit:
            options = None
    if options is None:
        _refuse_unknown_flags(verb, flags)
        flags = [storage.escape_controls(flag) for flag in flags]  # tyro prints words as they are if it refuses them
        try:
            options = parse()
        except SystemExit as error:
            if error.code == 2:  # tyro has named the fault
                _log.info("for example: %s %s", PROGRAM, kind.examples[0])  # type: ignore[attr-defined]
            raise
    if check:
        check(verb, options)
    if read_root and hasattr(options, "read_published_settings") and (past := options.read_published_settings()):
        without, options = options, parse(past.apply)
        past.log_differences(verb, without, options)
    return run, options


def _refuse_unknown_flags(verb: str, words: Sequence[str]) -> None:
    """ValueError if a verb does not have a flag that the command names."""
    flags = list_flags(verb)
    for word in words[:words.index("--")] if "--" in words else words:
        flag = word.partition("=")[0]
        known = re.sub(r"(^--|\.)no-", r"\1", flag.lower().replace("_", "-"))  # --no-text is a spelling of --text
        if not re.fullmatch(r"--[A-Za-z][\w.-]*", flag) or known in flags:
            continue
        # Without the dashes, which are alike in all flags.
        close = difflib.get_close_matches(flag[2:], sorted(name[2:] for name in flags), n=1)
        hint = f"did you mean --{close[0]}?" if close else f"python -m jobs {verb} --help-all"
        raise ValueError(f"{verb} has no flag {flag}\nhint: {hint}")


def check_options(verb: str, options: Any) -> None:
    """ValueError if the root, a dataset or the source of a command does not exist.

    It comes first, as the imports of a verb take seconds.
    """
    _check_root(verb, options)
    _check_names(verb, options)
    _check_files(options)
    if path := getattr(options, _WRITTEN.get(verb, ""), ""):
        from jobs.checks.source import check_new_file
        check_new_file(f"--{_WRITTEN[verb]}", path, makes_folder=verb == "export")
    if verb in _READ_A_SOURCE:
        from jobs.checks.source import check_source
        check_source(options.shard.source)
    if verb in _READ_A_RUN:
        from jobs.runs.run import Run
        Run.parse(options.common.root, options.run).section()


def _check_root(verb: str, options: Any) -> None:
    """ValueError if a local root is a file, if a verb that reads one finds none, or if a new one lies in the source.

    NoAnswer if the verb only looks, and its store does not answer.
    """
    root = options.common.root if hasattr(options, "common") else ""
    if not root:
        return
    is_waiting = any(getattr(options, name, None) for name in ("watch", "serve"))
    if not storage.is_local(root):
        if hasattr(options, "shard"):
            check_new_root(root, options.shard.source)
        if verb in LOOK and not is_waiting:
            _check_answer(root)
        if verb in _READ_A_ROOT and not is_waiting:
            _check_store_root(root)
        return
    folder = storage.local_path(root)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the root {root} is a file: expected a folder\nhint: --root FOLDER")
    if verb not in _READ_A_ROOT:
        if verb in _MAKES_A_ROOT:
            check_new_root(root, options.shard.source if hasattr(options, "shard") else ())
        return
    if getattr(options, "serve", None):  # it may start before the root is made
        return
    names = other_files(root)
    if names or not folder.is_dir():
        got = f"a folder with {names}" if names else "no folder"
        inner = roots_below(root)
        known = f"--root {storage.quote(inner[0])}" if inner else "--root FOLDER, the one that a stage wrote into"
        raise ValueError(f"{root} is no root: expected a folder with datasets or runs, got "
                         f"{got}\nhint: {known}")


def _check_store_root(root: str) -> None:
    """ValueError if nothing is at a root in a store, or only other objects."""
    try:
        names = storage.list_names(storage.normalize(root))
    except OSError as error:  # the keys may allow to read objects, and not to list them
        _log.debug("the root is not listed: %s", error)
        return
    if not FOLDERS.intersection(names):
        raise ValueError(f"{root} is no root: expected datasets/ or runs/ there, got "
                         f"{', '.join(names[:SHOWN_NAMES]) or 'nothing'}\nhint: --root s3://BUCKET/PREFIX")


def _check_answer(root: str) -> None:
    try:
        storage.check_store(root, STORE_ANSWER_S)
    except storage.NoAnswer:
        raise
    except OSError as error:  # the keys may allow to read objects, and not to list them
        _log.debug("the store answers: %s", error)


def _check_files(options: Any) -> None:
    """ValueError if a local file or folder that the command would read does not exist, or is a pipe or a device."""
    from jobs.checks.source import check_path, refuse_device
    values = [getattr(options, name, "") for name in _FILES]
    paths = [path for value in values for path in (value if isinstance(value, tuple) else [value])]
    for path in paths:
        if isinstance(path, str) and path and storage.is_local(path):
            check_path(path)
    shard = getattr(options, "shard", None)
    for path in (*shard.source, shard.captions) if shard else ():
        if storage.is_local(path):
            refuse_device(path)


def check_names(verb: str, options: Any) -> list["Dataset"]:
    """The datasets that a command names. ValueError if a name of a dataset or a run is invalid."""
    from jobs.runs.run import Run
    from pipeline.datasets.dataset import Dataset
    named = []
    for role in ("dataset", "database", "validation"):
        value: str | tuple[str, ...] = getattr(options, role, ())
        for text in filter(None, (value,) if isinstance(value, str) else value):
            named += [Dataset.parse(options.common.root, part.partition(":")[0]) for part in text.split("+")]
    if verb in ABOUT_ALL_VERSIONS and "@" in options.dataset:
        name, _, version = options.dataset.partition("@")
        raise ValueError(f"{options.dataset}: {verb} is about all versions of a dataset: expected {name}, got a "
                         f"version\nhint: python -m jobs {verb} {name}{ABOUT_ALL_VERSIONS[verb].format(version)}")
    for run in (getattr(options, "run", "") if verb != "sample" else "", getattr(options, "train_run", "")):
        if run:
            Run.parse(options.common.root, run)
    return named


def _check_names(verb: str, options: Any) -> None:
    """ValueError if a name is invalid, or if the command reads a dataset that does not exist."""
    from pipeline.datasets.dataset import refuse_unknown
    for dataset in check_names(verb, options):
        if verb in _READ_A_ROOT:
            command = dataset.command("shards") if verb == "embed" else "python -m jobs ls"
            refuse_unknown(dataset.root, dataset.name, command)


def flags_of(verb: str, words: Sequence[str]) -> Sequence[str]:
    """The words after a verb that belong to it. The words of `submit` end before the inner verb."""
    if verb != "submit":
        return words
    return words[:next((number for number, word in enumerate(words) if word in VERBS), len(words))]
