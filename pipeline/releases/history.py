"""The history of a published dataset: each pointer that there was, in its own file.

    <root>/published/<name>/000007.json          the seventh current.json
    <root>/published/<name>/moved-000007.json    a copy of it while `repair` gives it its place again

Each entry has its number (`sequence`) in its content too. An entry in the place of another one counts as damaged.
"""

import hashlib
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from pipeline import storage
from pipeline.datasets.pointer import parse_pointer
from pipeline.storage import DamagedFile


def history_folder(root: str, name: str) -> str:
    """The folder of the history of a dataset."""
    return storage.join(root, "published", name)


def history_url(root: str, name: str, sequence: int) -> str:
    """The URL of the entry of a publication."""
    return storage.join(history_folder(root, name), f"{sequence:06d}.json")


def list_history(root: str, name: str) -> list[str]:
    """URLs of the entries of a history, damaged ones too, in order. Other files in the folder are left out."""
    folder = history_folder(root, name)
    urls = [storage.join(folder, file) for file in storage.list_names(folder) if re.fullmatch(r"\d+\.json", file)]
    return sorted(urls, key=entry_number)


def entry_number(url: str) -> int:
    """The number in the name of an entry."""
    return int(url.rpartition("/")[2].removesuffix(".json"))


def read_entry(url: str) -> dict[str, Any] | None:
    """The publication in an entry, whatever its number; None if it is damaged, or no file."""
    try:
        return parse_pointer(storage.read_bytes(url))
    except DamagedFile:
        return None


def read_entry_bytes(root: str, name: str, url: str) -> bytes:
    """The bytes of an entry of a history; DamagedFile if it is no file."""
    with storage.verify_replaced(lambda: f"python -m jobs repair {name} --root {storage.quote(root)}"):
        return storage.read_bytes(url)


def add_entry(root: str, name: str, document: dict[str, Any]) -> None:
    """Write an entry of the history. DamagedFile if something else is in its place."""
    url = history_url(root, name, document["sequence"])
    if not storage.create_bytes(storage.json_bytes(document), url):
        there = parse_pointer(storage.read_bytes(url)) or {}
        if not is_same_publication(there, document):
            raise DamagedFile(f"{url} is not the publication of {name}@{document['version']}, which has this number\n"
                              f"hint: remove {url}; then python -m jobs verify")


def is_same_publication(document: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two documents name the same version with the same release, under the same number."""
    return all(document.get(key) == other.get(key) for key in ("sequence", "version", "release", "removed"))


def find_gaps(numbers: set[int], first: int) -> list[range]:
    """The numbers that are missing from `first` to the highest of `numbers`."""
    pairs = pairwise([first - 1, *sorted(number for number in numbers if number >= first)])
    return [range(before + 1, after) for before, after in pairs if after > before + 1]


def hash_first(root: str, name: str) -> str:
    """sha256 of the first entry of a history; "" without one."""
    urls = list_history(root, name)
    return hashlib.sha256(read_entry_bytes(root, name, urls[0])).hexdigest() if urls else ""


def restore_places(root: str, name: str, is_trusted: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Give trusted entries that are in the place of another one the file of their own number; the URLs of these.

    An entry that is in its own place is never replaced. A second copy of it is removed. It writes a copy
    of an entry before another one takes its file: a kill loses none. The next call uses the copies.
    """
    entries = {url: read_entry(url) for url in list_history(root, name)}
    newest = max(map(entry_number, entries), default=0)
    trusted = {url: document for url, document in entries.items() if document and is_trusted(document)}
    moved = {url: document for url, document in trusted.items() if entry_number(url) != document["sequence"] <= newest}
    copies = {url: document for url in list_copies(root, name)
              if (document := read_entry(url)) and is_trusted(document)}
    targets = {history_url(root, name, document["sequence"]): document for document in (copies | moved).values()}
    for url in targets.keys() & moved.keys():
        copy = _copy_url(root, name, moved[url]["sequence"])
        if copy not in copies:
            storage.put_json(moved[url], copy)
        copies[copy] = moved[url]
    for url, document in targets.items():
        if url in moved or entries.get(url) is None:
            storage.put_json(document, url)
    for url in [*(moved.keys() - targets.keys()), *copies]:
        storage.remove(url)
    return sorted(moved)


def list_copies(root: str, name: str) -> list[str]:
    """URLs of the copies that a killed `restore_places` has left."""
    folder = history_folder(root, name)
    return [storage.join(folder, file) for file in storage.list_names(folder) if re.fullmatch(r"moved-\d+\.json", file)]


def _copy_url(root: str, name: str, sequence: int) -> str:
    return storage.join(history_folder(root, name), f"moved-{sequence:06d}.json")
