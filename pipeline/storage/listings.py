"""List what stands in folders of local disks and S3."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.addresses import is_local, local_path, normalize
from pipeline.storage.errors import FILE, FOLDER, find_kind, refuse_special_folder, storage_errors, suppress_absence
from pipeline.storage.files import open_url
from pipeline.storage.remembered import recall

UNFINISHED = re.compile(r"(\..+\.|probe-)[0-9a-f]{16}")
"""The names of files that `unfinished_file` and `can_swap` write."""


def list_files(url: str) -> list[str]:
    """Sorted names of what stands directly below the folder `url` and is no folder; empty if there is no such folder.

    Links, pipes and devices are listed too: a reader of one of them names it. Files that another process is writing,
    or did not finish, are left out.
    """
    return sorted(name for name, kind in _list_kinds(url) if kind != FOLDER and not UNFINISHED.fullmatch(name))


def list_names(url: str) -> list[str]:
    """Sorted names of all that stands directly below the folder `url`: files, folders, links, pipes."""
    return sorted(name for name, _ in _list_kinds(url))


def list_folders(url: str) -> list[str]:
    """Sorted names of what stands directly below the folder `url` and is no file; empty if there is no such folder.

    Links that lead nowhere and pipes are listed too: a reader of what lies below one of them names it.
    """
    return sorted(name for name, kind in _list_kinds(url) if kind != FILE)


def _list_kinds(url: str) -> Iterator[tuple[str, str]]:
    """The name and kind (`find_kind`) of all that stands directly below the folder `url`.

    DamagedFile if a local `url` is no folder, or lies below a link that leads nowhere.
    """
    _, path = open_url(url)
    with storage_errors(url, "list"):
        if is_local(url):
            refuse_special_folder(url)
            with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
                yield from ((entry.name, kind) for entry in entries if (kind := _entry_kind(entry)))
            return
        with suppress_absence():
            for entry in _list_objects(url):
                yield entry["name"].rstrip("/").rsplit("/", 1)[-1], FILE if entry["type"] == "file" else FOLDER


def _list_objects(url: str) -> list[dict[str, Any]]:
    """The objects and folders directly below a folder of a store; FileNotFoundError if there are none."""
    fs, path = open_url(url)
    return recall("list", url, lambda: fs.ls(path, detail=True))


def _entry_kind(entry: os.DirEntry[str]) -> str:
    """The kind of an entry of a local folder; "" if it is gone. Most entries need no other call of the system."""
    is_link = entry.is_symlink()
    if not is_link and entry.is_file():
        return FILE
    return FOLDER if not is_link and entry.is_dir() else find_kind(Path(entry.path))


def walk(url: str) -> Iterator[tuple[str, int | None]]:
    """Every file below `url` as (relative name, bytes), in no fixed order; hidden names left out.

    None instead of bytes: a link that leads nowhere, or no regular file. OSError for a folder that cannot be read.
    """
    if is_local(url):
        base = str(local_path(url))
        seen = set()
        for folder, inner, files in os.walk(base, onerror=_raise, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above or beside
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in files:
                full = os.path.join(folder, name)
                if not name.startswith("."):
                    length = os.path.getsize(full) if os.path.isfile(full) else None
                    yield os.path.relpath(full, base).replace(os.sep, "/"), length
        return
    fs, path = open_url(url)
    with storage_errors(url, "list"):
        entries = fs.find(path, detail=True)
    for full, info in entries.items():
        name = full[len(path):].lstrip("/")
        if name and not any(part.startswith(".") for part in name.split("/")):
            yield name, int(info["size"])


def list_stamps(url: str) -> dict[str, str]:
    """A stamp of each file below `url`, by relative name: size and time, or size and ETag.

    A file with an unchanged stamp counts as unchanged. Hidden names are left out.
    """
    if is_local(url):
        base = local_path(url)
        stats = ((name, os.stat(base / name)) for name, length in walk(url) if length is not None)
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats}
    fs, path = open_url(url)
    with storage_errors(url, "list"):
        listed = fs.find(path, detail=True)
    return {full[len(path):].lstrip("/"): f"{info['size']}-{info.get('ETag') or info.get('mtime')}".replace('"', "")
            for full, info in listed.items()}


def list_sizes_and_times(url: str) -> dict[str, tuple[int, float]]:
    """Bytes and modification time (seconds of the epoch) of each file directly below the folder `url`, by name.

    The time is 0 if the store does not tell it.
    """
    _, path = open_url(url)
    with storage_errors(url, "list"):
        try:
            if is_local(url):
                with os.scandir(path) as entries:
                    return {entry.name: (stat.st_size, stat.st_mtime) for entry in entries
                            if _entry_kind(entry) == FILE and (stat := entry.stat())}
            listed = [info for info in _list_objects(url) if info["type"] == "file"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
    times = [info.get("LastModified") for info in listed]
    return {info["name"].rsplit("/", 1)[-1]: (int(info["size"]), time.timestamp() if time else 0.0)
            for info, time in zip(listed, times, strict=True)}


def glob(pattern: str) -> list[str]:
    """Sorted paths of the files that match a pattern (*, **, ?)."""
    fs, path = open_url(normalize(pattern))
    prefix = "" if is_local(pattern) else pattern.split("://", 1)[0] + "://"
    with storage_errors(pattern, "list"):
        # A link has the type "other", wherever it leads.
        return sorted(prefix + name for name, info in fs.glob(path, detail=True).items()
                      if info["type"] == "file" or (info.get("islink") and find_kind(Path(name)) == FILE))


def _raise(error: OSError) -> None:
    """Raise an error, as a callback of os.walk."""
    raise error
