"""Names of sources with patterns: `*`, `**`, `?`, `[0-9]`, and braces as in `{00000..00012}.tar`."""

from __future__ import annotations

import glob
import itertools
import math
import re

from braceexpand import braceexpand

from pipeline import storage

_MOST_NAMES = 1_000_000
"""Names that the ranges in braces may stand for."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def is_pattern(source: str) -> bool:
    """Whether a name is a pattern. A file or folder with this very name comes first."""
    return (glob.has_magic(source) or "{" in source) and not storage.is_file(source) and not _is_folder(source)


def match_pattern(source: str) -> list[str]:
    """URLs of the files that match a pattern: in the order of the braces, and sorted by name within each.

    ValueError if a name or pattern that comes from braces has no file, or if braces are not closed.
    """
    names = _expand_braces(source)
    if len(names) == 1:
        return _glob(names[0])
    files = storage.map_urls(lambda name: _glob(name) if glob.has_magic(name) else
                             [storage.normalize(name)] if storage.is_file(name) else [], names)
    if missing := [name for name, matches in zip(names, files, strict=True) if not matches]:
        raise ValueError(f"{source} stands for {len(names)} names, and {len(missing)} of them do not exist: "
                         f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}\n"
                         f"hint: correct the braces, or fetch the files that are missing")
    return list(dict.fromkeys(itertools.chain.from_iterable(files)))


def _expand_braces(source: str) -> list[str]:
    if "{" not in source:
        return [source]
    # braceexpand has all numbers of a range in memory.
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(source)) > _MOST_NAMES:
        raise ValueError(f"the braces in {source} stand for more than {_MOST_NAMES:,} names\nhint: name the folder")
    try:
        return list(braceexpand(source, escape=False))
    except ValueError as error:
        raise ValueError(f"the braces in {source} cannot be expanded: {error}\n"
                         f"hint: {{00000..00012}} or {{a,b}}") from None


def _glob(pattern: str) -> list[str]:
    return storage.glob(_literal_folders(pattern))


def _literal_folders(pattern: str) -> str:
    """The pattern with escaped letters in the folders that exist under their literal name."""
    if not storage.is_local(pattern):
        return pattern
    parts = pattern.split("/")
    count = next(count for count in range(len(parts) - 1, -1, -1) if not count or _is_folder("/".join(parts[:count])))
    return "/".join([*map(glob.escape, parts[:count]), *parts[count:]])


def _is_folder(source: str) -> bool:
    return storage.is_local(source) and bool(source) and storage.local_path(source).is_dir()
