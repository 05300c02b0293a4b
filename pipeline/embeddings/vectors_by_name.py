"""The vectors of a folder in clip-retrieval's layout, by the names of their images."""

import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.compvis_archive import KeyTable
from pipeline.formats import arrays, parquet


def list_pairs(source: str) -> list[tuple[str, str]]:
    """The URLs of the files of vectors of a folder, each with that of its metadata."""
    pairs, metadata_names = [], set(storage.list_files(storage.join(source, "metadata")))
    for name in storage.list_files(storage.join(source, "img_emb")):
        if match := re.fullmatch(r"img_emb_(.+)\.npy", name):
            about = f"metadata_{match[1]}.parquet"
            if about not in metadata_names:
                raise ValueError(f"{storage.join(source, 'img_emb', name)} has no metadata beside it: there is no "
                                 f"{storage.join(source, 'metadata', about)}\nhint: copy it again")
            pairs.append((storage.join(source, "img_emb", name), storage.join(source, "metadata", about)))
            metadata_names.remove(about)
    if pairs and (alone := sorted(name for name in metadata_names if re.fullmatch(r"metadata_.+\.parquet", name))):
        about = storage.join(source, "metadata", alone[0])
        vectors = storage.join(source, "img_emb", f"img_emb{alone[0].removeprefix('metadata')[:-len('parquet')]}npy")
        raise ValueError(f"{about} has no vectors beside it: there is no {vectors}\nhint: copy it again")
    if not pairs:
        raise ValueError(f"{source} has no img_emb/img_emb_*.npy, and no 1000x512-part_1.npz\nhint: --adopt FOLDER, "
                         f"the output folder of clip-retrieval's inference, or a retrieval database of CompVis")
    return pairs


class VectorsByName:
    """The vectors of a folder, found by the keys of samples.

    clip-retrieval names an image by its key, if it read tars, or by its path, if it read files. So a name belongs to
    a key if it equals the key, or if it ends in "/" and the key. "./" at the start and suffixes do not count.
    Vectors of local folders are mapped. Names take their bytes, and the longest of them once more for each row.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._vectors: list[np.ndarray] = []
        self._names: list[pa.Array] = []
        self._hashes: list[pa.Array | None] = []
        for vectors, about in list_pairs(source):
            self._vectors.append(_read_vectors(vectors))
            names, hashes = _read_names(about)
            if len(names) != len(self._vectors[-1]):
                raise ValueError(f"{vectors} has {len(self._vectors[-1])} rows, its metadata {len(names)}\n"
                                 f"hint: copy both again")
            self._names.append(names)
            self._hashes.append(hashes)
        self._table = KeyTable([[_reversed_stem(name) for name in names.to_pylist()] for names in self._names])

    @staticmethod
    @lru_cache(maxsize=1)
    def open_cached(source: str) -> "VectorsByName":
        """The vectors of a folder, kept in this process."""
        return VectorsByName(source)

    def find(self, key: str) -> tuple[list[int], bool]:
        """The places of the vectors that may be those of `key`, and whether their names are exactly the key."""
        name = key.encode(errors="surrogateescape")
        wanted = _reversed_stem(name)
        places = [*self._table.equal(wanted), *self._table.starting(wanted + b"/")]
        if exact := [place for place in places if self._name(place) == name]:
            return exact, True
        plain = _without_dots(name)
        return [place for place in places if any(stem == plain or stem.endswith(b"/" + plain)
                                                 for stem in _stems(_without_dots(self._name(place))))], False

    def vector(self, place: int) -> np.ndarray:
        """The vector at a place, (D,), of any length."""
        file, row = self._table.row(place)
        return np.array(self._vectors[file][row])

    def sha256(self, place: int) -> str | None:
        """The hash of the image at a place, None if the metadata has none."""
        file, row = self._table.row(place)
        hashes = self._hashes[file]
        return None if hashes is None else hashes[row].as_py()

    def _name(self, place: int) -> bytes:
        file, row = self._table.row(place)
        return self._names[file][row].as_py()


class RecurringKeys:
    """The keys that several samples of a dataset have, as a whole or in their last part."""

    def __init__(self, dataset: Dataset) -> None:
        whole, last = [], []
        for record in dataset.manifest("shards")["items"]:
            for row in metadata(dataset, record, ["key"]):
                name = row["key"].encode(errors="surrogateescape")
                whole.append(hash(name))
                last.append(hash(_last_stem(name)))
        # Two keys with one hash count as recurring too. Their images are encoded for nothing, and that is all.
        self._whole, self._last = _repeated(whole), _repeated(last)

    @staticmethod
    @lru_cache(maxsize=1)
    def open_cached(dataset: Dataset, content: str) -> "RecurringKeys":
        """The recurring keys of a dataset, kept in this process; `content` tells rebuilds apart."""
        return RecurringKeys(dataset)

    def has(self, key: str, *, exact: bool) -> bool:
        """Whether another sample has this key, or may have it where names are not `exact` keys."""
        name = key.encode(errors="surrogateescape")
        return hash(name) in self._whole if exact else hash(_last_stem(name)) in self._last


def _read_vectors(url: str) -> np.ndarray:
    array = (arrays.map_array(storage.local_path(url)) if storage.is_local(url)
             else arrays.parse_array(storage.read_bytes(url), url))
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{url} holds {array.dtype} {array.shape}, wanted are rows of numbers\n"
                         f"hint: the folder img_emb/ that clip-retrieval writes")
    return array


def _read_names(url: str) -> tuple[pa.Array, pa.Array | None]:
    """The names of images in a file of metadata, and their hashes where it has such a column."""
    hint = "hint: the folder metadata/ that clip-retrieval writes with img_emb/"
    try:
        table = parquet.read(storage.read_bytes(url), columns=["image_path", "sha256"])
        column = table["image_path"]
    except (pa.ArrowException, KeyError, OSError) as error:
        if isinstance(error, storage.StorageError):
            raise
        raise ValueError(f"{url} is no parquet with a column image_path: {error}\n{hint}") from error
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{url}: the column image_path does not name images: expected text, got {kind}\n{hint}")
    if column.null_count:
        raise ValueError(f"{url}: the column image_path does not name all images: expected {len(column)} names, got "
                         f"{len(column) - column.null_count}, the others are null\n{hint}")
    names = column.cast(kind).cast(pa.large_binary()).combine_chunks()  # a name may be no UTF-8
    hashed = "sha256" in table.column_names and pa.types.is_string(table["sha256"].type)
    return names, table["sha256"].combine_chunks() if hashed else None


def _without_dots(name: bytes) -> bytes:
    """A name without "./" at its start."""
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    return name


def _stems(name: bytes) -> Iterator[bytes]:
    """A name, and what is left of it without its last suffixes."""
    yield name
    first = name.rfind(b"/") + 1
    for end in range(len(name) - 1, first, -1):
        if name[end:end + 1] == b".":
            yield name[:end]


def _reversed_stem(name: bytes) -> bytes:
    """A name without "./" and suffixes, from its last byte to the first: so names with one end follow each other."""
    name = _without_dots(name)
    first = name.rfind(b"/") + 1
    end = name.find(b".", first + 1)
    return (name if end < 0 else name[:end])[::-1]


def _last_stem(name: bytes) -> bytes:
    return _reversed_stem(name).partition(b"/")[0]


def _repeated(hashes: list[int]) -> set[int]:
    values, counts = np.unique(np.array(hashes, np.int64), return_counts=True)
    return set(values[counts > 1].tolist())
