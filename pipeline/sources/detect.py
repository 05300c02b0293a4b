"""Choose the kind of a source by the names of its files."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.media.sample_names import system_folder
from pipeline.media.types import SUFFIXES
from pipeline.sources.companions import find_companions
from pipeline.sources.folder_files import (
    count_text,
    suffix_of,
)
from pipeline.sources.patterns import is_pattern, match_pattern
from pipeline.sources.source import LISTS, TARS, Source, list_all_files
from pipeline.tables.names import LOOSE_TABLES, USUAL_TABLES

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)
_SUFFIXES = {"pictures": SUFFIXES, "tars": TARS, "list": LISTS}
_FILE_SUFFIXES = (*TARS, *LISTS, *LOOSE_TABLES, *SUFFIXES)
_NAMES = {"pictures": "images", "tars": "tars", "list": "lists"}
_Listed = list[tuple[str, int | None]]


def open_source(config: ShardConfig) -> Source:
    """The source that the settings name; ValueError if there is none, or if its kind is not clear."""
    from pipeline.sources.folder import FolderSource
    from pipeline.sources.open_lists import open_lists
    from pipeline.sources.tars import TarSource
    if not config.source:
        raise ValueError("shard needs a source\nhint: --source FOLDER, or a list of URLs, or tars")
    kind: str = config.kind
    ignored: Counter[str] = Counter()
    listed: list[_Listed] = []
    if kind == "auto":
        listed = [_list_names(source) for source in config.source]
        kind, ignored = _choose_kind(config, listed)
    if kind != "tars" and (only := [name for name in ("image_key", "caption_key") if getattr(config, name)]):
        raise ValueError(f"shard.{only[0]}: a setting for tars, and {', '.join(config.source)} is no tar\n"
                         f"hint: --image-column and --caption-column for lists, --captions for folders")
    if kind == "pictures":
        # A pattern is matched by the folder itself.
        return FolderSource(config, listed[0] if len(listed) == 1 and _is_folder(config.source[0]) else None)
    addresses = list_all_files(config.source, kind)
    if not addresses:
        wanted = {"list": USUAL_TABLES, "tars": ", ".join(TARS)}[kind]
        raise ValueError(f"no files ending in {wanted} in {', '.join(config.source)}\n"
                         f"hint: name the folder above, or a pattern such as 'FOLDER/**/*'")
    source = open_lists(config, addresses) if kind == "list" else TarSource(config, addresses)
    source.ignored = ignored
    if ignored:
        _log.info("%s: files that are ignored: %s", ", ".join(config.source), count_text(ignored))
    return source


def _is_folder(source: str) -> bool:
    return not (source.lower().endswith(_FILE_SUFFIXES) or is_pattern(source) or storage.is_file(source))


def _list_names(source: str) -> _Listed:
    """The files that an address stands for: those in the folder, those that match, or itself."""
    if _is_folder(source):
        try:
            return list(storage.walk(source))
        except FileNotFoundError:
            raise ValueError(f"there is no file or folder {source}") from None
    if source.lower().endswith(_FILE_SUFFIXES) or not is_pattern(source):
        return [(source, 0)]
    return [(name, 0) for name in match_pattern(source)]


def _choose_kind(config: ShardConfig, listed: list[_Listed]) -> tuple[str, Counter[str]]:
    """The one kind that all sources have, and the files that are ignored."""
    sources = config.source
    names_by_kind: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    for source, files in zip(sources, listed, strict=True):
        base = storage.normalize(source) if _is_folder(source) else ""
        kinds, others = _sort_by_kind([name for name, _ in files], base)
        if not kinds:
            there = f"; it has {count_text(others)}" if others else ""
            raise ValueError(f"no images in {source}{there}\nhint: files ending in {', '.join(SUFFIXES)} are looked "
                             f"for, in folders below it too; or .tar; or lists, ending in {USUAL_TABLES}")
        for kind, names in kinds.items():
            names_by_kind.setdefault(kind, []).extend(names)
        ignored += others
    if config.captions and "pictures" in names_by_kind:  # only images take captions from a file
        return "pictures", ignored
    if len(names_by_kind) == 1:
        return next(iter(names_by_kind)), ignored
    names_by_kind = dict(sorted(names_by_kind.items(), key=lambda each: (-len(each[1]), each[0])))
    counts = ", ".join(f"{len(names)} {_NAMES[kind]} ({', '.join(sorted(names)[:2])}{', ...' if names[2:] else ''})"
                       for kind, names in names_by_kind.items())
    hints = [f"{' or '.join(f'--kind {kind}' for kind in names_by_kind)}, which leaves the others out",
             "or make a dataset of each"]
    if {"pictures", "list"} <= names_by_kind.keys():
        hints.insert(0, "--captions FILE if a list describes the images")
    raise ValueError(f"the files of {', '.join(sources)} are of several kinds: {counts}\n"
                     f"hint: {'; '.join(hints)}")


def _sort_by_kind(names: list[str], base: str) -> tuple[dict[str, list[str]], Counter[str]]:
    """The files of each kind, and counts of all others. Names are relative to `base`, or URLs without one."""
    kinds: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    for name in names:
        kind = next((kind for kind, suffixes in _SUFFIXES.items() if name.lower().endswith(suffixes)), "")
        if (folder := system_folder(name)):
            others[f"{folder}/"] += 1
        elif kind:
            kinds.setdefault(kind, []).append(name)
        else:
            others[suffix_of(name)] += 1
    if not kinds:
        loose = [name for name in names if name.lower().endswith(LOOSE_TABLES) and not system_folder(name)]
        kinds["list"] = loose
        others -= Counter(map(suffix_of, loose))
    if len(kinds) > 1 and "list" in kinds:
        stage_folders = {_folder(name) for name in names if name.rpartition("/")[2] == "plan.json"}
        companions = find_companions(kinds, stage_folders, lambda name: storage.join(base, name) if base else name)
        others.update(suffix_of(name) for name in companions)
        kinds["list"] = [name for name in kinds["list"] if name not in companions]
    return {kind: files for kind, files in kinds.items() if files}, others


def _folder(name: str) -> str:
    """The folder of a file, with a slash at its end."""
    return name[:name.rfind("/") + 1]
