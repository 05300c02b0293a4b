"""Read the embedding archives that CompVis published."""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.formats.arrays import HEADER_ERRORS, first_line

ARCHIVE_NAME = re.compile(r"(\d+)x(\d+)(?:-part_(\d+))?\.npz")
ROW_NUMBER = ("source_row", "url", "key", "width", "height", "patch_left", "patch_top", "patch_short_side")
OPEN_ARCHIVES = 2  # archives whose vectors are in memory


def list_archives(source: str) -> list[str]:
    """The URLs of the archives of a folder in CompVis's layout, in the order of their numbers."""
    archives = [(int(match[3] or 0), name) for name in storage.list_files(source)
             if (match := ARCHIVE_NAME.fullmatch(name))]
    return [storage.join(source, name) for _, name in sorted(archives)]


class KeyTable:
    """Names of the rows of several files, in order, each with its file and its row there."""

    def __init__(self, names: Sequence[Sequence[bytes]]) -> None:
        self.offsets = np.cumsum([0, *map(len, names)])
        every = np.concatenate([np.array(file_names, np.bytes_) for file_names in names])
        self.order = np.argsort(every, kind="stable")
        self.names = every[self.order]

    def place(self, name: bytes) -> int:
        """The place of a name in the sorted names, or the place for it if it is missing."""
        return int(np.searchsorted(self.names, name))

    def name(self, place: int) -> bytes:
        """The name at a place. Empty beyond the last one."""
        return bytes(self.names[place]) if place < len(self.names) else b""

    def beginning(self, prefix: bytes) -> tuple[int, list[bytes]]:
        """The names with a prefix, and the place of the first one."""
        first = self.place(prefix)
        matches: list[bytes] = []
        while (name := self.name(first + len(matches))).startswith(prefix):
            matches.append(name)
        return first, matches

    def equal(self, name: bytes) -> range:
        """The places of the rows of a name."""
        if len(name) > self.names.itemsize:  # numpy would copy all names to compare them with a longer one
            return range(0)
        return range(self.place(name), int(np.searchsorted(self.names, name, side="right")))

    def starting(self, prefix: bytes) -> range:
        """The places of the names that start so, without a list of them; the last byte of `prefix` is below 255."""
        if len(prefix) > self.names.itemsize:
            return range(0)
        return range(self.place(prefix), self.place(prefix[:-1] + bytes([prefix[-1] + 1])))

    def row(self, place: int) -> tuple[int, int]:
        """The file and the row in it of the name at a place."""
        row = self.order[place]
        file = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return file, int(row - self.offsets[file])


class Archives:
    """The vectors of CompVis's archives by image and patch. All names and the vectors of two archives are in memory.

    A number as `img_id` is the row of the source, as CompVis counts. A text as `img_id` is the last part of the URL,
    with or without suffix, or the key.
    """

    def __init__(self, source: str) -> None:
        self.source, self.files = source, list_archives(source)
        names, kinds = [], set()
        for url in self.files:
            ids, places = _identities(url)
            kinds.add(ids.dtype.kind == "U")
            names.append([_patch(name, place) for name, place in zip(ids.tolist(), places.tolist(), strict=True)])
        if len(kinds) > 1:
            raise ValueError(f"some files of {source} have numbers as img_id, others text\n"
                             f"hint: one database in a folder")
        self.text, self.table = kinds.pop(), KeyTable(names)
        self.vectors: Callable[[int], np.ndarray] = lru_cache(maxsize=OPEN_ARCHIVES)(lambda file: _member(
            self.files[file], "embedding"))

    @staticmethod
    @lru_cache(maxsize=1)
    def open_cached(source: str) -> "Archives":
        """The archives of a folder, cached in this process."""
        return Archives(source)

    def rows(self, rows: Sequence[dict[str, Any]]) -> list[np.ndarray | None]:
        """The vector of each sample by its metadata, None for an image without vectors.

        ValueError if the image has vectors, but not for this part of it.
        """
        # An image may have several names. All images of a shard use the same kind of name.
        name_rules: list[Callable[[dict[str, Any]], str]] = [lambda row: str(row.get("source_row"))]
        if self.text:
            name_rules = [lambda row: _last(row), lambda row: _last(row).rpartition(".")[0] or _last(row),
                      lambda row: row["key"]]
        places: list[int | None] = []
        for call in name_rules:
            places = [self._place(row, call(row)) for row in rows]
            if any(place is not None for place in places):
                break
        wanted = [(None if place is None else self.table.row(place)) for place in places]
        vectors: list[np.ndarray | None] = [None] * len(wanted)
        # File by file: a file is decompressed as a whole.
        for number, (file, row) in sorted(((number, file_row) for number, file_row in enumerate(wanted) if file_row),
                                          key=lambda pair: pair[1]):
            vectors[number] = np.array(self.vectors(file)[row])
        return vectors

    def _place(self, row: dict[str, Any], name: str) -> int | None:
        first, there = self.table.beginning(name.encode() + b"\n")
        if not there:
            return None
        if row.get("patch_left") is None:
            if len(there) > 1:
                raise ValueError(f"{self.source} has {len(there)} patches of the image {name}, and its sample "
                                 f"{row['key']} is no patch\nhint: adopt tars of these patches (shard --adopt)")
            return first
        if row["width"] is None:  # it could not be read
            return None
        x, y = row["patch_left"], row["patch_top"]
        patch = _patch(name, [x, y, x + row["width"], y + row["height"]])
        if patch not in there:
            raise ValueError(f"{self.source} has {len(there)} patches of the image {name}: expected one at {x}, {y} of "
                             f"{row['width']} x {row['height']} pixels (sample {row['key']}, short side of the image "
                             f"{row['patch_short_side']}), got none\nhint: embed without --adopt, or adopt vectors "
                             f"of the same patches")
        return first + there.index(patch)


def _last(row: dict[str, Any]) -> str:
    """The last part of the URL of a sample."""
    return re.split(r"[?#]", str(row.get("url") or ""))[0].rpartition("/")[2]


def _patch(name: Any, place: Sequence[int]) -> bytes:
    return f"{name}\n{' '.join(map(str, place))}".encode()


def _identities(url: str) -> tuple[np.ndarray, np.ndarray]:
    """img_id (n,), numbers or text, and patch_coords (n, 4): left, top, right, bottom, of a whole archive."""
    count, dim = map(int, ARCHIVE_NAME.fullmatch(url.rpartition("/")[2]).groups()[:2])  # type: ignore[union-attr]
    ids, places, shape = _member(url, "img_id"), _member(url, "patch_coords"), _member(url, "embedding", shape=True)
    if tuple(shape) != (count, dim):
        raise ValueError(f"{url} has embeddings of shape {tuple(shape)}, its name says ({count}, {dim})\n"
                         f"hint: was it copied whole?")
    if ids.shape != (count,) or ids.dtype.kind not in "iuUS" or places.shape != (count, 4):
        raise ValueError(f"{url}: img_id is {ids.dtype} {ids.shape} and patch_coords {places.shape}, wanted are "
                         f"numbers or text ({count},) and ({count}, 4)\nhint: as CompVis's retrieval databases have "
                         f"them")
    if places.dtype.kind not in "iu" and not (places.dtype.kind == "f" and (places == np.rint(places)).all()):
        raise ValueError(f"{url}: patch_coords are {places.dtype}, wanted are whole numbers: left, top, right, bottom\n"
                         f"hint: coordinates in pixels of the whole image")
    return np.char.decode(ids, "utf-8", "replace") if ids.dtype.kind == "S" else ids, places.astype(np.int64)


def _member(url: str, name: str, *, shape: bool = False) -> Any:
    """An array of an archive, or its shape alone; ValueError if it is not there, or could only be unpickled."""
    archive: Any = storage.local_path(url) if storage.is_local(url) else io.BytesIO(storage.read_bytes(url))
    try:
        with zipfile.ZipFile(archive) as members:
            with members.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                if version not in read:
                    raise ValueError(f"version {version} of the format")
                array_shape, _, kind = read[version](file)
                header_bytes = file.tell()
            if kind.hasobject:
                raise ValueError(f"{name} is Python objects, which only unpickling reads, and that may run anything")
            if math.prod(array_shape) * kind.itemsize > members.getinfo(f"{name}.npy").file_size - header_bytes:
                raise ValueError(f"{name} is cut off, or its header says more than there is")
            if shape:
                return array_shape
            with members.open(f"{name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except (KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, struct.error,
            *HEADER_ERRORS) as error:
        if isinstance(error, storage.StorageError):
            raise
        text = f"it has no {name}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{url} cannot be read: {text}\nhint: np.savez with embedding, img_id as numbers or text "
                         f"(img_id.astype(str)) and patch_coords") from error
