"""Checks of the place of a root, by its name and the names of its files. They import nothing heavy."""

import contextlib
import logging
import os
from collections.abc import Sequence

from pipeline import storage

FOLDERS = frozenset({"datasets", "runs", "pictures", "published", "takedowns"})
"""Folders of a root. A folder with one of them is a root."""
SHOWN_NAMES = 3
_MOST_FOLDERS = 100  # to look into for roots
_log = logging.getLogger(__name__)


def other_files(root: str) -> str:
    """The first names in a folder that is no root; "" for a root, an empty folder or none. One listing."""
    names = storage.list_names(storage.normalize(root))
    return "" if FOLDERS.intersection(names) else ", ".join(names[:SHOWN_NAMES])


def roots_below(root: str) -> list[str]:
    """The folders of a local folder that are roots, among its first ones."""
    roots = []
    for name in storage.list_folders(storage.normalize(root))[:_MOST_FOLDERS]:
        folder = storage.join(root, name)
        with contextlib.suppress(OSError, ValueError):  # a pipe, or a folder of another user
            roots += [folder] if FOLDERS.intersection(storage.list_names(storage.normalize(folder))) else []
    return roots


def check_new_root(root: str, sources: Sequence[str]) -> None:
    """ValueError if a new root is the folder of a source, or lies in it.

    The next version would take the images of the root for images of the source. One line of the log names other files
    in a local root.
    """
    place = _real_path(root)
    for source in sources:
        if f"{place}/".startswith(f"{_real_path(source).rstrip('/')}/") and not _is_root(root):
            raise ValueError(f"the root {root} lies in the source {source}, and the next version would have images of "
                             f"the root too: expected a folder outside of the source\nhint: --root FOLDER")
    if storage.is_local(root) and (names := other_files(root)):
        _log.info("the root %s has other files (%s): datasets/ and runs/ will be beside them. --root FOLDER names "
                  "another place.", root, names)


def _is_root(root: str) -> bool:
    place = storage.normalize(root)  # a prefix may have a million images beside these folders
    return any(storage.list_folders(storage.join(place, name)) for name in sorted(FOLDERS))


def _real_path(url: str) -> str:
    return os.path.realpath(storage.normalize(url)) if storage.is_local(url) else storage.normalize(url)
