"""Checks of local paths, such as the source of a dataset.

They import nothing heavy, so that a mistyped path is refused within a second.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.sources.patterns import is_pattern


def check_source(sources: Sequence[str]) -> None:
    """ValueError if no source is named, or a local one does not exist."""
    if not sources:
        raise ValueError("no source is named: expected --source, got none\n"
                         "hint: --source FOLDER, or a list of URLs, or tars")
    for source in sources:
        if storage.is_local(source) and not is_pattern(source):
            check_path(source)


def check_path(text: str) -> None:
    """ValueError if a local path does not exist, with a path that is spelled like it."""
    path = Path(storage.local_path(text)).expanduser()
    if path.exists():
        return
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1) if parent == path.absolute().parent else []
    hint = f"did you mean {path.with_name(close[0])}?" if close else f"ls {parent} shows what is there"
    raise ValueError(f"there is no file or folder {text}\nhint: {hint}")
