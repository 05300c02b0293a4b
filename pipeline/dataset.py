"""A dataset is sealed folders side by side; the same number names the same samples in all of them.

    <root>/datasets/<name>/<version>/{shards,embeddings,index,neighbors/<database>}

A global row is the offset of the shard plus the row in it; ids of an index are global rows.
"""

import hashlib
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.stages.manifest import read_manifest, sealed_input
from pipeline.storage import parquet

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DEFAULT_VERSION = "v1"
_NO_NUMBER = np.uint16(0x7C00)  # the exponent of NaN and infinity in float16
_HASH = re.compile("[0-9a-f]{64}")
_T = TypeVar("_T")
_CHECKED: set[tuple[str, str]] = set()  # files of published versions, and their hashes


@dataclass(frozen=True)
class Dataset:
    """The address of a dataset: root, name and version."""

    root: str
    name: str
    version: str = DEFAULT_VERSION
    trusted: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """Of a published version the sha256 of the manifest of each stage: what is read is held against it."""

    @classmethod
    def parse(cls, root: str, text: str) -> "Dataset":
        """`name` or `name@version` below `root`."""
        name, _, version = text.partition("@")
        for part in (name, version or DEFAULT_VERSION):
            if not _NAME.fullmatch(part):
                raise ValueError(f"{text!r} is not a dataset name\nhint: letters, digits, '.', '_' and '-', "
                                 f"as in ukiyo-e or ukiyo-e@v2")
        return cls(storage.normal(root), name, version or DEFAULT_VERSION)

    @property
    def label(self) -> str:
        """The name as the user writes it."""
        return self.name if self.version == DEFAULT_VERSION else f"{self.name}@{self.version}"

    def following(self) -> "Dataset":
        """The next version: v2 after v1."""
        stem, number = re.fullmatch(r"(.*?)(\d*)", self.version).groups()  # type: ignore[union-attr]
        return Dataset(self.root, self.name, f"{stem}{int(number or 1) + 1}")

    def path(self, stage_name: str) -> str:
        """The folder of a stage, below the root."""
        return f"datasets/{self.name}/{self.version}/{stage_name}"

    def folder(self, stage_name: str) -> str:
        """The address of the folder of a stage."""
        return storage.join(self.root, self.path(stage_name))

    def command(self, stage_name: str) -> str:
        """The command that would finish a stage of this dataset, for hints."""
        verb, _, database = stage_name.partition("/")
        verb, more = {"shards": ("shard", " --source FOLDER"), "embeddings": ("embed", ""),
                      "text_embeddings": ("embed", " --captions"),
                      "tombstones": ("index", " --tombstone KEYS_FILE"),
                      "neighbors": ("neighbors", f" --database {database}")}.get(verb, (verb, ""))
        return f"python -m jobs {verb} {self.label}{more} --root {self.root}"

    def manifest(self, stage_name: str) -> dict[str, Any]:
        """The manifest of a sealed stage; ValueError with the command that would finish it."""
        return read_manifest(self.folder(stage_name), self.command(stage_name), dict(self.trusted).get(stage_name))

    def sealed(self, stage_name: str) -> bool:
        """Whether a stage has ended."""
        return storage.exists(storage.join(self.folder(stage_name), "manifest.json"))

    def identity(self, stage_name: str) -> dict[str, Any]:
        """How a later stage names this one among its inputs."""
        return sealed_input(self.root, self.path(stage_name), self.command(stage_name),
                              dict(self.trusted).get(stage_name))

    def fetch(self, stage_name: str, entry: dict[str, Any], *, check: bool = False) -> Path:
        """A local path of a file in the manifest of a stage."""
        url = storage.place(self.folder(stage_name), entry["name"])
        return storage.fetch(url, entry, check=check or self._suspect(url, entry))

    def opened(self, stage_name: str, entry: dict[str, Any], open_: Callable[[Path], _T]) -> _T:
        """What `open_` makes of the local path of a file in the manifest of a stage."""
        url = storage.place(self.folder(stage_name), entry["name"])
        return storage.opened(url, entry, open_, check=self._suspect(url, entry))

    def _suspect(self, url: str, entry: dict[str, Any]) -> bool:
        """Whether the bytes of a published file are still to be held against its hash, once in each process."""
        if not self.trusted or (url, entry["sha256"]) in _CHECKED:
            return False
        _CHECKED.add((url, entry["sha256"]))
        return True


def datasets(root: str) -> list[Dataset]:
    """Every version of every dataset that has a folder below a root, sealed or not."""
    return [Dataset(storage.normal(root), name, version)
            for name in storage.folders(storage.join(storage.normal(root), "datasets"))
            for version in storage.folders(storage.join(storage.normal(root), "datasets", name))]


def file_of(record: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The one file of a record or manifest whose name ends so."""
    found = [entry for entry in record["files"] if entry["name"].endswith(suffix)]
    assert len(found) == 1, (suffix, record["files"])
    return found[0]


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def finite(vectors: np.ndarray, place: str) -> np.ndarray:
    """The vectors (..., D) as they are; ValueError if there are numbers in them that are none."""
    if vectors.dtype == np.float16 and not ((vectors.view(np.uint16) & _NO_NUMBER) == _NO_NUMBER).any():
        return vectors  # as below, ten times faster
    good = np.isfinite(vectors).all(-1)
    if not good.all():
        raise ValueError(f"{int((~good).sum())} vectors of {place} are not finite\n"
                         f"hint: python -m jobs verify tells which files are meant; embed --rebuild makes them anew")
    return vectors


class Embeddings:
    """The embeddings of a dataset by global row, memory-mapped shard by shard.

    len() is the number of rows N; `dim` is D. Rows are float16 and of unit length, or all zero
    where a picture could not be decoded.
    """

    def __init__(self, dataset: Dataset, of: str = "embeddings") -> None:
        self.manifest = dataset.manifest(of)
        self.shards = [dataset.opened(of, file_of(record, ".npy"), mapped) for record in self.manifest["items"]]
        self.offsets = np.cumsum([0, *(len(shard) for shard in self.shards)])
        for shard, record in zip(self.shards, self.manifest["items"], strict=True):
            if len(shard) != record["samples"]:
                raise ValueError(f"{dataset.folder(of)}: shard {record['id']} has {len(shard)} rows, its "
                                 f"manifest says {record['samples']}\nhint: python -m jobs verify")
            if shard.ndim != 2 or shard.shape[1] != self.shards[0].shape[1]:
                raise ValueError(f"{dataset.folder(of)}: shard {record['id']} has vectors of shape {shard.shape[1:]}, "
                                 f"the first one {self.shards[0].shape[1:]}\nhint: python -m jobs verify")
        self.folder = dataset.folder(of)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def dim(self) -> int:
        """Length D of a vector."""
        return int(self.shards[0].shape[1])

    def all(self) -> np.ndarray:
        """Every row, (N, D) float16, in memory."""
        return finite(np.concatenate(self.shards), self.folder)

    def rows(self, ids: np.ndarray, *, once: bool = False) -> np.ndarray:
        """The rows `ids` (any shape S, int64) as (*S, D) float16; zeros for the id -1 (none); ValueError for NaN.

        With `once` a shard leaves memory as soon as it was read.
        """
        flat = np.asarray(ids, np.int64).reshape(-1)
        out = np.zeros((len(flat), self.dim), np.float16)
        order = np.argsort(flat, kind="stable")
        ends = np.searchsorted(flat[order], self.offsets)
        for number in np.flatnonzero(np.diff(ends)):
            here = order[ends[number]:ends[number + 1]]
            out[here] = finite(self.shards[number][flat[here] - self.offsets[number]], self.folder)
            if once:
                self.shards[number]._mmap.madvise(mmap.MADV_DONTNEED)
        return out.reshape(*np.shape(ids), self.dim)

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Every row in order, as (first row, (n, D) float16) with n at most `rows`, read and not mapped."""
        pieces: list[np.ndarray] = []
        first = here = 0
        for shard in self.shards:
            done = 0
            while done < len(shard):
                count = min(rows - here, len(shard) - done)
                pieces.append(np.fromfile(shard.filename, shard.dtype, count * self.dim, offset=shard.offset
                                          + done * self.dim * shard.itemsize).reshape(count, self.dim))
                here, done = here + count, done + count
                if here == rows:
                    yield first, finite(np.concatenate(pieces) if len(pieces) > 1 else pieces[0], self.folder)
                    pieces, first, here = [], first + here, 0
        if here:
            yield first, finite(np.concatenate(pieces), self.folder)


def metadata(dataset: Dataset, record: dict[str, Any], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The parquet rows of one shard's samples, in the order of its tar; failed rows left out."""
    return _succeeded(dataset, record, columns).to_pylist()


def _succeeded(dataset: Dataset, record: dict[str, Any], columns: list[str] | None) -> pa.Table:
    data = dataset.fetch("shards", file_of(record, ".parquet")).read_bytes()
    table = parquet.read(data, columns=None if columns is None else [*columns, "status"])
    return table.filter(pc.equal(table["status"], "success"))


def labels(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """What tells the pictures of a shard from others, (N_i, 2) uint64: of the bytes stored, of the bytes fetched.

    Patches of one picture have the second in common. Where it is not known what was fetched, it is the first.
    """
    columns = {"sha256", "original_sha256"} & set(_schema(dataset, record))
    table = _succeeded(dataset, record, sorted(columns))
    stored = fetched = table["sha256"].to_pylist()
    if "original_sha256" in columns:  # empty or none where it is not known
        fetched = [one or other for one, other in zip(table["original_sha256"].to_pylist(), stored, strict=True)]
    return np.stack([_labels(stored), _labels(fetched)], 1)


def perceptual_hashes(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """The perceptual hashes of a shard, (N_i,) uint64; ValueError if it was packed without."""
    if "phash" not in _schema(dataset, record):
        raise ValueError(f"the shards of {dataset.label} have no perceptual hashes\n"
                         f"hint: shard it with --duplicates near, or do without --copy-bits")
    return np.array([row["phash"] or 0 for row in metadata(dataset, record, ["phash"])], np.uint64)


def _labels(texts: list[str]) -> np.ndarray:
    """A number for each text, (N,) uint64: the first bytes of a hash, or of the hash of what is none."""
    if all(map(_HASH.fullmatch, texts)):
        return np.frombuffer(bytes.fromhex("".join(text[:16] for text in texts)), "<u8").astype(np.uint64)
    return np.array([int.from_bytes(bytes.fromhex(text[:16]) if _HASH.fullmatch(text)
                                    else hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
                     for text in texts], np.uint64)


def _schema(dataset: Dataset, record: dict[str, Any]) -> list[str]:
    return pq.read_schema(dataset.fetch("shards", file_of(record, ".parquet"))).names
