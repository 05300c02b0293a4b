"""Checks of local paths, such as the source of a dataset.

They import nothing heavy, so that a mistyped path is refused within a second.
"""

import difflib
import os
import shlex
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


def check_new_file(flag: str, text: str, *, makes_folder: bool) -> None:
    """ValueError if nothing can be written at the path of a flag: it is a URL, or no folder is there for the file."""
    if "://" in text:
        name = shlex.quote(text.rstrip("/").rsplit("/", 1)[-1] or "PATH")
        raise ValueError(f"{flag} {text} is a URL: expected a path on this machine\n"
                         f"hint: {flag} {name}; a store gets it by its own client, such as `aws s3 cp`")
    folder = Path(text).expanduser().absolute().parent
    if not makes_folder and not folder.is_dir():
        raise ValueError(f"there is no folder for {flag} {text}\nhint: mkdir -p {shlex.quote(str(folder))}")


def refuse_device(text: str) -> None:
    """ValueError if a device, pipe or socket stands at a local path: reading it may never end."""
    path = Path(storage.local_path(text)).expanduser()
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(f"{text} is a pipe, a socket or a device: expected a file or a folder\n"
                         f"hint: name a file instead")


def check_path(text: str) -> None:
    """ValueError if a local path does not exist, with a path that is spelled like it, or if a device stands there."""
    path = Path(storage.local_path(text)).expanduser()
    if path.exists():
        refuse_device(text)
        return
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1) if parent == path.absolute().parent else []
    hint = f"did you mean {path.with_name(close[0])}?" if close else f"ls {parent} shows what is there"
    raise ValueError(f"there is no file or folder {text}\nhint: {hint}")
