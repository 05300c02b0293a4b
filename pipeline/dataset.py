"""A dataset is sealed folders side by side; the same number names the same samples in all of them.

    <root>/datasets/<name>/<version>/{shards,embeddings,index,neighbors/<database>}

A global row is the offset of the shard plus the row in it; ids of an index are global rows.
"""

import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import stage, storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DEFAULT_VERSION = "v1"


@dataclass(frozen=True)
class Dataset:
    """The address of a dataset: root, name and version."""

    root: str
    name: str
    version: str = DEFAULT_VERSION

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
                      "neighbors": ("neighbors", f" --database {database}")}.get(verb, (verb, ""))
        return f"python -m jobs {verb} {self.label}{more} --root {self.root}"

    def manifest(self, stage_name: str) -> dict[str, Any]:
        """The manifest of a sealed stage; ValueError with the command that would finish it."""
        return stage.manifest_of(self.folder(stage_name), self.command(stage_name))

    def sealed(self, stage_name: str) -> bool:
        """Whether a stage has ended."""
        return storage.exists(storage.join(self.folder(stage_name), "manifest.json"))

    def identity(self, stage_name: str) -> dict[str, Any]:
        """How a later stage names this one among its inputs."""
        return stage.identity(self.root, self.path(stage_name), self.command(stage_name))

    def fetch(self, stage_name: str, entry: dict[str, Any], *, check: bool = False) -> Path:
        """A local path of a file in the manifest of a stage."""
        return storage.fetch(storage.place(self.folder(stage_name), entry["name"]), entry, check=check)


def file_of(record: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The one file of a record or manifest whose name ends so."""
    found = [entry for entry in record["files"] if entry["name"].endswith(suffix)]
    assert len(found) == 1, (suffix, record["files"])
    return found[0]


def finite(vectors: np.ndarray, place: str) -> np.ndarray:
    """The vectors (..., D) as they are; ValueError if there are numbers in them that are none."""
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
        paths = [dataset.fetch(of, file_of(record, ".npy")) for record in self.manifest["items"]]
        self.shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
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

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows `ids` (any shape S, int64) as (*S, D) float16; zeros for the id -1 (none); ValueError for NaN."""
        flat = np.asarray(ids, np.int64).reshape(-1)
        out = np.zeros((len(flat), self.dim), np.float16)
        shard_of = np.searchsorted(self.offsets, flat, side="right") - 1
        for number in np.unique(shard_of[flat >= 0]):
            here = (shard_of == number) & (flat >= 0)
            out[here] = finite(self.shards[number][flat[here] - self.offsets[number]], self.folder)
        return out.reshape(*np.shape(ids), self.dim)


def metadata(dataset: Dataset, record: dict[str, Any], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The parquet rows of one shard's samples, in the order of its tar; failed rows left out."""
    data = dataset.fetch("shards", file_of(record, ".parquet")).read_bytes()
    table = pq.read_table(io.BytesIO(data), columns=None if columns is None else [*columns, "status"])
    return [row for row in table.to_pylist() if row["status"] == "success"]


def content_hashes(dataset: Dataset) -> np.ndarray:
    """sha256 of every sample's picture by global row, (N,) of 32-byte strings."""
    hashes = [bytes.fromhex(row["sha256"]) for record in dataset.manifest("shards")["items"]
              for row in metadata(dataset, record, ["sha256"])]
    return np.array(hashes, dtype="S32") if hashes else np.empty(0, "S32")
