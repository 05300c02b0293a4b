"""Import and export embeddings in the layout of clip-retrieval."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.embeddings import clip
from pipeline.embeddings.compvis_archive import ROW_NUMBER, Archives, KeyTable, list_archives
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.media import tars
from pipeline.stages import records as stage_records
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.storage import arrays, parquet

LAYOUT, COMPVIS = "clip-retrieval", "compvis"
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
        vectors: Any = arrays.load_array(self.dataset.fetch("embeddings", file_of(item.inputs["embeddings"], ".npy")))
        # Others know no rows that mark a picture which did not decode.
        there = vectors.any(1)
        files = {"img_emb": vectors[there]}
        if self.with_texts:
            texts = arrays.load_array(
                self.dataset.fetch("text_embeddings", file_of(item.inputs["text_embeddings"], ".npy")))
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
        self.source = storage.normalize(source)

    def section(self) -> dict[str, Any]:
        return {"adopted": COMPVIS if list_archives(self.source) else LAYOUT, "encoder": super().section()["encoder"]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        addresses = list_archives(self.source) or [url for pair in _pairs(self.source) for url in pair]
        glances = [json.dumps(storage.summarize_file(url)) for url in addresses]
        return super().inputs() | {"vectors": {"path": "", "digest": storage.digest(glances)}}

    def together(self, gpu: bool | None = None) -> int:
        return 1

    def process(self, item: Item, scratch: Path) -> Output:
        encoder, record = clip.load_encoder(self.config.clip()), item.inputs["shard"]
        with (times := Times())("read"):
            path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
            samples = list(tars.read(path))
            if list_archives(self.source):
                adopted = Archives.open_cached(self.source).rows(self._rows(record, samples))
            else:
                adopted = _Vectors.open_cached(self.source).rows([sample["__key__"] for sample in samples])
        vectors = np.zeros((len(samples), encoder.dim), np.float16)
        ledger, usable = [], []
        for row, (sample, vector) in enumerate(zip(samples, adopted, strict=True)):
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
                own = encoder.images(np.stack([encoder.prepared(tars.sample_image(samples[row])) for row in probes]))
            cosine = (own * vectors[probes].astype(np.float32)).sum(1)
            if cosine.min() < _LEAST:
                raise ValueError(f"the vectors of {self.source} are not those that {self.config.model} "
                                 f"({self.config.pretrained}) makes of shard {record['id']}: cosine "
                                 f"{cosine.min():.3f}\nhint: --model and --pretrained as when they were made, and the "
                                 f"pictures that they were made of")
        out = scratch / "embeddings.npy"
        np.save(out, vectors, allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger, times=dict(times.seconds))

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        totals = stage_records.totals(records)
        if totals["samples"] and totals["noted"].get("not_adopted", 0) == totals["samples"]:
            raise StageFailed(f"embed: none of the {totals['samples']} samples has a vector in {self.source}\n"
                              f"hint: are these the vectors of {self.dataset.label}? --overwrite adopts others")
        return super().finish(records, scratch)

    def _rows(self, record: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The metadata of the samples of a shard, as far as archives tell pictures and patches apart by it."""
        entry = file_of(record, ".parquet")
        there = set(pq.read_schema(self.dataset.fetch("shards", entry)).names)
        rows = metadata(self.dataset, record, [name for name in ROW_NUMBER if name in there])
        if [row["key"] for row in rows] != [sample["__key__"] for sample in samples]:
            raise ValueError(f"shard {record['id']} does not have the samples that its parquet names\n"
                             f"hint: python -m jobs verify")
        return rows


def _pairs(source: str) -> list[tuple[str, str]]:
    """The addresses of the files of vectors of a folder, each with that of its metadata."""
    pairs, metadata_names = [], set(storage.list_files(storage.join(source, "metadata")))
    for name in storage.list_files(storage.join(source, "img_emb")):
        if match := re.fullmatch(r"img_emb_(.+)\.npy", name):
            about = f"metadata_{match[1]}.parquet"
            if about not in metadata_names:
                raise ValueError(f"{storage.join(source, 'img_emb', name)} has no metadata beside it: there is no "
                                 f"{storage.join(source, 'metadata', about)}\nhint: copy it again")
            pairs.append((storage.join(source, "img_emb", name), storage.join(source, "metadata", about)))
    if not pairs:
        raise ValueError(f"{source} has no img_emb/img_emb_*.npy, and no 1000x512-part_1.npz\nhint: --adopt FOLDER, "
                         f"the output folder of clip-retrieval's inference, or a retrieval database of CompVis")
    return pairs


class _Vectors:
    """The vectors of a folder by key; about 40 bytes a row are kept in memory (of a remote folder, all of it)."""

    def __init__(self, source: str) -> None:
        keys, self.vectors = [], []
        for vectors, about in _pairs(source):
            self.vectors.append(arrays.map_array(storage.local_path(vectors)) if storage.is_local(vectors)
                                else arrays.parse_array(storage.read_bytes(vectors), vectors))
            array = self.vectors[-1]
            if array.ndim != 2 or array.dtype.kind not in "fiu":
                raise ValueError(f"{vectors} holds {array.dtype} {array.shape}, wanted are rows of numbers\n"
                                 f"hint: the folder img_emb/ that clip-retrieval writes")
            try:
                column = parquet.read(storage.read_bytes(about), columns=["image_path"])["image_path"]
            except (pa.ArrowException, KeyError, OSError) as error:
                raise ValueError(f"{about} is no parquet with a column image_path: {error}\n"
                                 f"hint: the folder metadata/ that clip-retrieval writes with img_emb/") from error
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
                raise ValueError(f"{about}: image_path holds {column.type}, {column.null_count} cells are empty; "
                                 f"wanted are keys of samples\nhint: the folder metadata/ that clip-retrieval writes")
            if len(column) != len(self.vectors[-1]):
                raise ValueError(f"{vectors} has {len(self.vectors[-1])} rows, its metadata {len(column)}")
            # clip-retrieval names a sample by its key, or by a path that ends in it.
            names = column.cast(pa.large_binary()).to_pylist()  # a name may be no UTF-8
            keys.append([name.rpartition(b"/")[2].partition(b".")[0] for name in names])
        self.table = KeyTable(keys)

    @staticmethod
    @lru_cache(maxsize=1)
    def open_cached(source: str) -> "_Vectors":
        """Those of a folder, kept in this process."""
        return _Vectors(source)

    def rows(self, keys: list[str]) -> list[np.ndarray | None]:
        """The vector of each key, None for those that have none."""
        rows: list[np.ndarray | None] = []
        for key in keys:
            place = self.table.place(key.encode())
            if self.table.name(place) != key.encode():
                rows.append(None)
                continue
            file, row = self.table.row(place)
            rows.append(np.array(self.vectors[file][row]))
        return rows
