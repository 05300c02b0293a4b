"""Embeddings in clip-retrieval's layout: img_emb/, text_emb/ and metadata/ with files of the same numbers and rows."""

import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import clip, stage, storage, tars
from pipeline.dataset import Dataset, file_of
from pipeline.embed import Embed, EmbedConfig, Times
from pipeline.stage import Entry, Item, Output, Stage

LAYOUT = "clip-retrieval"
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
        table = pq.read_table(self.dataset.fetch("shards", file_of(item.inputs["shards"], ".parquet")))
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
    """The stage that takes the embeddings of a dataset from a folder in clip-retrieval's layout.

    Rows find their samples by key (`image_path`). That the encoder is the one that is named is seen by encoding a few
    pictures of each shard.
    """

    def __init__(self, dataset: Dataset, config: EmbedConfig, source: str) -> None:
        super().__init__(dataset, config)
        self.source = storage.normal(source)

    def section(self) -> dict[str, Any]:
        return {"adopted": LAYOUT, "encoder": super().section()["encoder"]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        glances = [json.dumps(storage.glance(url)) for pair in _pairs(self.source) for url in pair]
        return super().inputs() | {"vectors": {"path": "", "digest": stage.digest(glances)}}

    def process(self, item: Item, scratch: Path) -> Output:
        encoder, record = clip.load(self.config.clip()), item.inputs["shard"]
        with (times := Times())("read"):
            path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
            samples = list(tars.read(path))
            found = _Vectors.of(self.source).rows([sample["__key__"] for sample in samples])
        vectors = np.zeros((len(samples), encoder.dim), np.float16)
        ledger, probes = [], []
        for row, (sample, vector) in enumerate(zip(samples, found, strict=True)):
            if vector is None:
                ledger.append(Entry(sample["__key__"], "not_adopted", "row of zeros", kept=True))
                continue
            if vector.shape != (encoder.dim,):
                raise ValueError(f"{self.source} has vectors of {vector.size}, {self.config.model} makes {encoder.dim}")
            length = np.linalg.norm(vector.astype(np.float32))
            if not np.isfinite(length) or length == 0:
                ledger.append(Entry(sample["__key__"], "not_finite", "row of zeros", kept=True))
                continue
            vectors[row] = vector.astype(np.float32) / length
            probes += [row] if len(probes) < _PROBES else []
        if probes:
            with times("forward"):
                own = encoder.images(np.stack([encoder.prepared(tars.picture(samples[row])) for row in probes]))
            cosine = (own * vectors[probes].astype(np.float32)).sum(1)
            if cosine.min() < _LEAST:
                raise ValueError(f"the vectors of {self.source} are not those that {self.config.model} "
                                 f"({self.config.pretrained}) makes of shard {record['id']}: cosine "
                                 f"{cosine.min():.3f}\nhint: --model and --pretrained as when they were made")
        out = scratch / "embeddings.npy"
        np.save(out, vectors, allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger, times=dict(times.seconds))


def _pairs(source: str) -> list[tuple[str, str]]:
    """The addresses of the files of vectors of a folder, each with that of its metadata."""
    found = []
    for name in storage.names(storage.join(source, "img_emb")):
        if match := re.fullmatch(r"img_emb_(.+)\.npy", name):
            found.append((storage.join(source, "img_emb", name),
                          storage.join(source, "metadata", f"metadata_{match[1]}.parquet")))
    if not found:
        raise ValueError(f"{source} has no img_emb/img_emb_*.npy\nhint: --adopt FOLDER, the output folder of "
                         f"clip-retrieval's inference")
    return found


class _Vectors:
    """The vectors of a folder by key; about 40 bytes a row are kept in memory (of a remote folder, all of it)."""

    def __init__(self, source: str) -> None:
        keys, self.vectors = [], []
        for vectors, metadata in _pairs(source):
            self.vectors.append(np.load(storage.local_path(vectors), mmap_mode="r", allow_pickle=False)
                                if storage.is_local(vectors)
                                else np.load(io.BytesIO(storage.read_bytes(vectors)), allow_pickle=False))
            column = pq.read_table(io.BytesIO(storage.read_bytes(metadata)), columns=["image_path"])["image_path"]
            if len(column) != len(self.vectors[-1]):
                raise ValueError(f"{vectors} has {len(self.vectors[-1])} rows, its metadata {len(column)}")
            # clip-retrieval names a sample by its key, or by a path that ends in it.
            keys.append(np.array([key.rpartition("/")[2].partition(".")[0] for key in column.to_pylist()], np.bytes_))
        self.offsets = np.cumsum([0, *map(len, keys)])
        every = np.concatenate(keys)
        self.order = np.argsort(every, kind="stable")
        self.keys = every[self.order]

    @staticmethod
    @lru_cache(maxsize=1)
    def of(source: str) -> "_Vectors":
        """Those of a folder, kept in this process."""
        return _Vectors(source)

    def rows(self, keys: list[str]) -> list[np.ndarray | None]:
        """The vector of each key, None for those that have none."""
        wanted = np.array(keys, np.bytes_)
        places = np.searchsorted(self.keys, wanted)
        found = []
        for place, key in zip(places, wanted, strict=True):
            if place == len(self.keys) or self.keys[place] != key:
                found.append(None)
                continue
            row = self.order[place]
            file = int(np.searchsorted(self.offsets, row, side="right")) - 1
            found.append(np.array(self.vectors[file][row - self.offsets[file]]))
        return found
