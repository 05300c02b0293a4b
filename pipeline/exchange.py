"""Embeddings in the layouts of others.

clip-retrieval's: img_emb/, text_emb/ and metadata/ with files of the same numbers and rows. CompVis's retrieval
databases: 100000x512-part_1.npz and so on, with embedding (n, d), img_id (n,) and patch_coords (n, 4).
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import clip, storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.embed import Embed, EmbedConfig
from pipeline.media import tars
from pipeline.stages import records as stage_records
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.storage import parquet

LAYOUT, COMPVIS = "clip-retrieval", "compvis"
_ARCHIVE = re.compile(r"(\d+)x(\d+)(?:-part_(\d+))?\.npz")
_ROW = ("source_row", "url", "key", "width", "height", "patch_left", "patch_top", "patch_short_side")
_OPEN = 2  # archives whose vectors are in memory at once
_PROBES, _LEAST = 4, 0.99  # pictures of a shard that are encoded to see whether adopted vectors can be theirs


class Export(Stage):
    """The stage from embeddings to a folder that clip-retrieval's index and back end read as their own."""

    name = "export"

    def __init__(self, dataset: Dataset, config: EmbedConfig) -> None:
        super().__init__(dataset.root, dataset.path(LAYOUT), config)
        self.dataset = dataset
        self.with_texts = storage.exists(storage.join(dataset.folder("text_embeddings"), "manifest.json"))

    def section(self) -> dict[str, Any]:
        return {"layout": LAYOUT}

    def inputs(self) -> dict[str, dict[str, Any]]:
        names = ["shards", "embeddings", *(["text_embeddings"] if self.with_texts else [])]
        return {name: self.dataset.identity(name) for name in names}

    def plan(self) -> Iterator[Item]:
        records = [self.dataset.manifest(name)["items"] for name in self.inputs()]
        for together in zip(*records, strict=True):
            yield Item(together[0]["id"], {**dict(zip(self.inputs(), together, strict=True)),
                                           "count": together[0]["samples"]})

    def process(self, item: Item, scratch: Path) -> Output:
        table = parquet.read(self.dataset.fetch("shards", file_of(item.inputs["shards"], ".parquet")))
        table = table.filter(pc.equal(table["status"], "success"))
        vectors = np.load(self.dataset.fetch("embeddings", file_of(item.inputs["embeddings"], ".npy")))
        # Others know no rows that mark a picture which did not decode.
        there = vectors.any(1)
        files = {"img_emb": vectors[there]}
        if self.with_texts:
            texts = np.load(self.dataset.fetch("text_embeddings", file_of(item.inputs["text_embeddings"], ".npy")))
            files["text_emb"] = texts[there]
        output = Output(samples=int(there.sum()))
        for kind, rows in files.items():
            output.files[f"{kind}/{kind}_{item.id}.npy"] = path = scratch / f"{kind}.npy"
            np.save(path, rows, allow_pickle=False)
        output.ledger = [Entry(key, "undecodable") for key, good in zip(table["key"].to_pylist(), there, strict=True)
                         if not good]
        table = table.filter(pa.array(there))
        table = table.add_column(0, "image_path", table["key"])
        output.files[f"metadata/metadata_{item.id}.parquet"] = path = scratch / "metadata.parquet"
        pq.write_table(table, path)
        return output


class AdoptEmbeddings(Embed):
    """The stage that takes the embeddings of a dataset from a folder in the layout of clip-retrieval or CompVis.

    Rows find their samples by key (`image_path`), or by `img_id` and the place of the patch. That the encoder is the
    one that is named is seen by encoding a few pictures of each shard.
    """

    def __init__(self, dataset: Dataset, config: EmbedConfig, source: str) -> None:
        super().__init__(dataset, config)
        self.source = storage.normal(source)

    def section(self) -> dict[str, Any]:
        return {"adopted": COMPVIS if _archives(self.source) else LAYOUT, "encoder": super().section()["encoder"]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        addresses = _archives(self.source) or [url for pair in _pairs(self.source) for url in pair]
        glances = [json.dumps(storage.glance(url)) for url in addresses]
        return super().inputs() | {"vectors": {"path": "", "digest": storage.digest(glances)}}

    def together(self, gpu: bool | None = None) -> int:
        return 1

    def process(self, item: Item, scratch: Path) -> Output:
        encoder, record = clip.load(self.config.clip()), item.inputs["shard"]
        with (times := Times())("read"):
            path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
            samples = list(tars.read(path))
            if _archives(self.source):
                found = _Archives.of(self.source).rows(self._rows(record, samples))
            else:
                found = _Vectors.of(self.source).rows([sample["__key__"] for sample in samples])
        vectors = np.zeros((len(samples), encoder.dim), np.float16)
        ledger, usable = [], []
        for row, (sample, vector) in enumerate(zip(samples, found, strict=True)):
            if vector is None:
                ledger.append(Entry(sample["__key__"], "not_adopted", "row of zeros", kept=True))
                continue
            if vector.shape != (encoder.dim,):
                raise ValueError(f"{self.source} has vectors of {vector.size} numbers, {self.config.model} makes "
                                 f"{encoder.dim}\nhint: --model and --pretrained as when they were made")
            length = np.linalg.norm(vector.astype(np.float32))
            if not np.isfinite(length) or length == 0:
                ledger.append(Entry(sample["__key__"], "not_finite", "row of zeros", kept=True))
                continue
            vectors[row] = vector.astype(np.float32) / length
            usable.append(row)
        if usable:
            # Spread over the shard: vectors in another order begin well.
            probes = [usable[place] for place in np.linspace(0, len(usable) - 1, min(_PROBES, len(usable))).astype(int)]
            with times("forward"):
                own = encoder.images(np.stack([encoder.prepared(tars.picture(samples[row])) for row in probes]))
            cosine = (own * vectors[probes].astype(np.float32)).sum(1)
            if cosine.min() < _LEAST:
                raise ValueError(f"the vectors of {self.source} are not those that {self.config.model} "
                                 f"({self.config.pretrained}) makes of shard {record['id']}: cosine "
                                 f"{cosine.min():.3f}\nhint: --model and --pretrained as when they were made, and the "
                                 f"pictures that they were made of")
        out = scratch / "embeddings.npy"
        np.save(out, vectors, allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger, times=dict(times.seconds))

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        totals = stage_records.totals(records)
        if totals["samples"] and totals["noted"].get("not_adopted", 0) == totals["samples"]:
            raise StageFailed(f"embed: none of the {totals['samples']} samples has a vector in {self.source}\n"
                              f"hint: are these the vectors of {self.dataset.label}? --rebuild adopts others")
        return super().finish(records, scratch)

    def _rows(self, record: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The metadata of the samples of a shard, as far as archives tell pictures and patches apart by it."""
        entry = file_of(record, ".parquet")
        there = set(pq.read_schema(self.dataset.fetch("shards", entry)).names)
        rows = metadata(self.dataset, record, [name for name in _ROW if name in there])
        if [row["key"] for row in rows] != [sample["__key__"] for sample in samples]:
            raise ValueError(f"shard {record['id']} does not have the samples that its parquet names\n"
                             f"hint: python -m jobs verify")
        return rows


def _pairs(source: str) -> list[tuple[str, str]]:
    """The addresses of the files of vectors of a folder, each with that of its metadata."""
    found, beside = [], set(storage.names(storage.join(source, "metadata")))
    for name in storage.names(storage.join(source, "img_emb")):
        if match := re.fullmatch(r"img_emb_(.+)\.npy", name):
            about = f"metadata_{match[1]}.parquet"
            if about not in beside:
                raise ValueError(f"{storage.join(source, 'img_emb', name)} has no metadata beside it: there is no "
                                 f"{storage.join(source, 'metadata', about)}\nhint: copy it again")
            found.append((storage.join(source, "img_emb", name), storage.join(source, "metadata", about)))
    if not found:
        raise ValueError(f"{source} has no img_emb/img_emb_*.npy, and no 1000x512-part_1.npz\nhint: --adopt FOLDER, "
                         f"the output folder of clip-retrieval's inference, or a retrieval database of CompVis")
    return found


def _archives(source: str) -> list[str]:
    """The addresses of the archives of a folder in CompVis's layout, in the order of their numbers."""
    found = [(int(match[3] or 0), name) for name in storage.names(source) if (match := _ARCHIVE.fullmatch(name))]
    return [storage.join(source, name) for _, name in sorted(found)]


class _Vectors:
    """The vectors of a folder by key; about 40 bytes a row are kept in memory (of a remote folder, all of it)."""

    def __init__(self, source: str) -> None:
        keys, self.vectors = [], []
        for vectors, about in _pairs(source):
            try:
                self.vectors.append(np.load(storage.local_path(vectors), mmap_mode="r", allow_pickle=False)
                                    if storage.is_local(vectors)
                                    else np.load(io.BytesIO(storage.read_bytes(vectors)), allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise ValueError(f"{vectors} is no whole .npy file: {str(error).splitlines()[0]}\n"
                                 f"hint: copy it again") from error
            try:
                column = parquet.read(storage.read_bytes(about), columns=["image_path"])["image_path"]
            except (pa.ArrowException, KeyError) as error:
                raise ValueError(f"{about} is no parquet with a column image_path: {error}\n"
                                 f"hint: the folder metadata/ that clip-retrieval writes with img_emb/") from error
            if len(column) != len(self.vectors[-1]):
                raise ValueError(f"{vectors} has {len(self.vectors[-1])} rows, its metadata {len(column)}")
            # clip-retrieval names a sample by its key, or by a path that ends in it.
            keys.append([key.rpartition("/")[2].partition(".")[0].encode() for key in column.to_pylist()])
        self.table = _Table(keys)

    @staticmethod
    @lru_cache(maxsize=1)
    def of(source: str) -> "_Vectors":
        """Those of a folder, kept in this process."""
        return _Vectors(source)

    def rows(self, keys: list[str]) -> list[np.ndarray | None]:
        """The vector of each key, None for those that have none."""
        found = []
        for key in keys:
            place = self.table.place(key.encode())
            if self.table.name(place) != key.encode():
                found.append(None)
                continue
            file, row = self.table.row(place)
            found.append(np.array(self.vectors[file][row]))
        return found


class _Table:
    """Names of the rows of several files, in order, each with its file and its row there."""

    def __init__(self, names: Sequence[Sequence[bytes]]) -> None:
        self.offsets = np.cumsum([0, *map(len, names)])
        every = np.concatenate([np.array(some, np.bytes_) for some in names])
        self.order = np.argsort(every, kind="stable")
        self.names = every[self.order]

    def place(self, name: bytes) -> int:
        """Where a name stands, or would."""
        return int(np.searchsorted(self.names, name))

    def name(self, place: int) -> bytes:
        """The name at a place, nothing beyond the last."""
        return bytes(self.names[place]) if place < len(self.names) else b""

    def beginning(self, prefix: bytes) -> tuple[int, list[bytes]]:
        """The names that begin so, and the place of the first."""
        first = self.place(prefix)
        found = []
        while (name := self.name(first + len(found))).startswith(prefix):
            found.append(name)
        return first, found

    def row(self, place: int) -> tuple[int, int]:
        """The file and the row in it of the name at a place."""
        row = self.order[place]
        file = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return file, int(row - self.offsets[file])


class _Archives:
    """The vectors of CompVis's archives by picture and patch; in memory are the names of all and two archives' vectors.

    A picture is called by the row of the source where `img_id` is a number, as CompVis counts; where it is text, by the
    last part of its address, with or without its ending, or by its key.
    """

    def __init__(self, source: str) -> None:
        self.source, self.files = source, _archives(source)
        names, kinds = [], set()
        for url in self.files:
            ids, places = _identities(url)
            kinds.add(ids.dtype.kind == "U")
            names.append([_patch(name, place) for name, place in zip(ids.tolist(), places.tolist(), strict=True)])
        if len(kinds) > 1:
            raise ValueError(f"some files of {source} have numbers as img_id, others text\n"
                             f"hint: one database in a folder")
        self.text, self.table = kinds.pop(), _Table(names)
        self.vectors: Callable[[int], np.ndarray] = lru_cache(maxsize=_OPEN)(lambda file: _member(
            self.files[file], "embedding"))

    @staticmethod
    @lru_cache(maxsize=1)
    def of(source: str) -> "_Archives":
        """Those of a folder, kept in this process."""
        return _Archives(source)

    def rows(self, rows: Sequence[dict[str, Any]]) -> list[np.ndarray | None]:
        """The vector of each sample by its metadata, None for those whose picture has none; ValueError if a picture is
        there, but not this part of it.
        """
        # As many names as a picture may go by; a shard goes by one of them.
        called: list[Callable[[dict[str, Any]], str]] = [lambda row: str(row.get("source_row"))]
        if self.text:
            called = [lambda row: _last(row), lambda row: _last(row).rpartition(".")[0] or _last(row),
                      lambda row: row["key"]]
        places: list[int | None] = []
        for call in called:
            places = [self._place(row, call(row)) for row in rows]
            if any(place is not None for place in places):
                break
        wanted = [(None if place is None else self.table.row(place)) for place in places]
        found: list[np.ndarray | None] = [None] * len(wanted)
        # File by file: a file is decompressed as a whole.
        for number, (file, row) in sorted(((number, one) for number, one in enumerate(wanted) if one),
                                          key=lambda pair: pair[1]):
            found[number] = np.array(self.vectors(file)[row])
        return found

    def _place(self, row: dict[str, Any], name: str) -> int | None:
        first, there = self.table.beginning(name.encode() + b"\n")
        if not there:
            return None
        if row.get("patch_left") is None:
            if len(there) > 1:
                raise ValueError(f"{self.source} has {len(there)} patches of the picture {name}, and its sample "
                                 f"{row['key']} is no patch\nhint: adopt tars of these patches (shard --adopt)")
            return first
        if row["width"] is None:  # it could not be read
            return None
        left, top = row["patch_left"], row["patch_top"]
        patch = _patch(name, [left, top, left + row["width"], top + row["height"]])
        if patch not in there:
            raise ValueError(f"{self.source} has {len(there)} patches of the picture {name}, but none at {left}, {top} "
                             f"of {row['width']} x {row['height']} pixels as the sample {row['key']}, which was cut "
                             f"from a picture of short side {row['patch_short_side']}\nhint: the coordinates must be "
                             f"those of the same patches: --adopt takes no vectors of others")
        return first + there.index(patch)


def _last(row: dict[str, Any]) -> str:
    """The last part of the address that a sample is from."""
    return re.split(r"[?#]", str(row.get("url") or ""))[0].rpartition("/")[2]


def _patch(name: Any, place: Sequence[int]) -> bytes:
    return f"{name}\n{' '.join(map(str, place))}".encode()


def _identities(url: str) -> tuple[np.ndarray, np.ndarray]:
    """img_id (n,), numbers or text, and patch_coords (n, 4): left, top, right, bottom, of a whole archive."""
    count, dim = map(int, _ARCHIVE.fullmatch(url.rpartition("/")[2]).groups()[:2])  # type: ignore[union-attr]
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
                         f"hint: pixels of the picture that the patch was cut from")
    return ids.astype(str) if ids.dtype.kind == "S" else ids, places.astype(np.int64)


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
                found, _, kind = read[version](file)
            if kind.hasobject:
                raise ValueError(f"{name} is Python objects, which only unpickling reads, and that may run anything")
            if shape:
                return found
            with members.open(f"{name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        text = f"it has no {name}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{url} cannot be read: {text}\nhint: np.savez with embedding, img_id as numbers or text "
                         f"(img_id.astype(str)) and patch_coords") from error
