"""Remove the unfinished files of processes that were killed."""

import os
import re
from collections.abc import Iterator

from pipeline.storage.addresses import is_local, join, local_path
from pipeline.storage.files import list_files, modified_time, remove

ABANDONED_S = 3600.0  # a process that wrote nothing into an unfinished file for so long is dead
_UNFINISHED = re.compile(r"(\..+\.|probe-)[0-9a-f]{16}")  # as unfinished_file and can_swap name them


def remove_unfinished(folder: str, now: float, *, below: bool = False) -> int:
    """Remove abandoned files from a folder, and with `below` from the folders in it; how many there were.

    `now`: the time of the store. An object store has whole objects only, so the folders below are not listed there.
    """
    removed = 0
    for url in _list_unfinished(folder, below):
        try:
            if now - modified_time(url) > ABANDONED_S:
                remove(url)
                removed += 1
        except FileNotFoundError:  # finished meanwhile
            continue
    return removed


def _list_unfinished(folder: str, below: bool) -> Iterator[str]:
    if not (below and is_local(folder)):
        yield from (join(folder, name) for name in list_files(folder) if _UNFINISHED.fullmatch(name))
        return
    for parent, _, names in os.walk(local_path(folder)):
        yield from (os.path.join(parent, name) for name in names if _UNFINISHED.fullmatch(name))
