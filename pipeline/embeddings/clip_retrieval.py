"""Import and export embeddings in the layout of clip-retrieval."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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
from pipeline.embeddings.clip_weights import describe_encoder
from pipeline.embeddings.compvis_archive import ROW_NUMBER, Archives, list_archives
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.decode_batch import decode_images
from pipeline.embeddings.embed import Embed
from pipeline.embeddings.encode_shards import count_cores
from pipeline.embeddings.vectors_by_name import RecurringKeys, VectorsByName, list_pairs
from pipeline.formats import arrays, parquet
from pipeline.media import tars
from pipeline.stages import records as stage_records
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.storage import DamagedFile
from pipeline.takedowns import hidden_rows

LAYOUT, COMPVIS = "clip-retrieval", "compvis"
HIDDEN = "hidden"
"""The reason of rows that an export leaves out because searches do."""
PROBES = 16
"""Images of each shard that are encoded again, to see whether adopted vectors are theirs."""
LEAST_COSINE = 0.99
"""Cosine of an adopted vector to that of the encoder here, at least. Another precision changes less than 0.001."""
_log = logging.getLogger(__name__)


class Export(Stage):
    """The stage from embeddings to a folder that clip-retrieval's index and back end read as their own."""

    name = "export"
    by_choice = frozenset({HIDDEN})

    def __init__(self, dataset: Dataset, config: EmbedConfig) -> None:
        super().__init__(dataset.root, dataset.path(LAYOUT), config)
        self.dataset = dataset
        with_texts = storage.exists(storage.join(dataset.folder("text_embeddings"), "manifest.json"))
        self.stages = ("shards", "embeddings", *(("text_embeddings",) if with_texts else ()))

    @property
    def command(self) -> str:
        named = f"{self.dataset.name}@{self.dataset.version}"  # --export takes the published version of a bare name
        return f"python -m jobs embed {named} --export {LAYOUT} --root {storage.quote(self.root)}"

    @property
    def replacement(self) -> str:
        # embed --overwrite would also make the embeddings again, and a published version refuses that.
        return f"python -m jobs rm {self.path} --root {storage.quote(self.root)}; then {self.command}"

    def section(self) -> dict[str, Any]:
        return {"layout": LAYOUT}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return ({name: self.dataset.identity(name) for name in self.stages}
                | hidden_rows.hidden_row_inputs(self.dataset))

    @cached_property
    def hidden(self) -> np.ndarray:
        """The global rows that must not be found, ascending (T,) int64."""
        return hidden_rows.read_hidden_rows(self.dataset)

    def plan(self) -> Iterator[Item]:
        records, offset = [self.dataset.manifest(name)["items"] for name in self.stages], 0
        for together in zip(*records, strict=True):
            count = together[0]["samples"]
            end = offset + count
            # Without hidden rows, plans are as they were before exports left these out.
            first = {"offset": offset} if np.any((self.hidden >= offset) & (self.hidden < end)) else {}
            yield Item(together[0]["id"], {**dict(zip(self.stages, together, strict=True)), "count": count, **first})
            offset = end

    def process(self, item: Item, scratch: Path) -> Output:
        table = parquet.read(self.dataset.fetch("shards", file_of(item.inputs["shards"], ".parquet")))
        table = table.filter(pc.equal(table["status"], "success"))
        vectors: Any = arrays.load_array(self.dataset.fetch("embeddings", file_of(item.inputs["embeddings"], ".npy")))
        # Others know no rows that mark an image which did not decode.
        decoded, hidden = vectors.any(1), np.zeros(len(vectors), bool)
        if "offset" in item.inputs:
            hidden = np.isin(item.inputs["offset"] + np.arange(len(vectors)), self.hidden)
        there = decoded & ~hidden
        files = {"img_emb": vectors[there]}
        if "text_embeddings" in self.stages:
            texts = arrays.load_array(
                self.dataset.fetch("text_embeddings", file_of(item.inputs["text_embeddings"], ".npy")))
            files["text_emb"] = texts[there]
        output = Output(samples=int(there.sum()))
        for kind, rows in files.items():
            output.files[f"{kind}/{kind}_{item.id}.npy"] = path = scratch / f"{kind}.npy"
            np.save(path, rows, allow_pickle=False)
        output.ledger = [Entry(key, HIDDEN if is_hidden else "undecodable") for key, good, is_hidden
                         in zip(table["key"].to_pylist(), there, hidden, strict=True) if not good]
        table = table.filter(pa.array(there))
        if "image_path" in table.column_names:  # a column of the source: readers want one of that name
            table = table.rename_columns([f"source_{name}" if name == "image_path" else name
                                          for name in table.column_names])
        table = table.add_column(0, "image_path", table["key"])
        output.files[f"metadata/metadata_{item.id}.parquet"] = path = scratch / "metadata.parquet"
        pq.write_table(table, path)
        return output


class AdoptEmbeddings(Embed):
    """The stage that takes the embeddings of a dataset from a folder in the layout of clip-retrieval or CompVis.

    Rows find their samples by key (`image_path`), or by `img_id` and the place of the patch. The stage encodes some
    images of each shard again, and refuses a vector that is not theirs. If several samples or vectors share a name,
    the hash of the image tells them apart. Without a hash the stage encodes all of these images.
    """

    def __init__(self, dataset: Dataset, config: EmbedConfig, source: str) -> None:
        super().__init__(dataset, config)
        self.source = storage.normalize(source)

    def section(self) -> dict[str, Any]:
        return {"adopted": COMPVIS if list_archives(self.source) else LAYOUT, "encoder": super().section()["encoder"]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        addresses = list_archives(self.source) or [url for pair in list_pairs(self.source) for url in pair]
        glances = [json.dumps(storage.summarize_file(url)) for url in addresses]
        return super().inputs() | {"vectors": {"path": "", "digest": storage.digest(glances)}}

    def together(self, gpu: bool | None = None) -> int:
        return 1

    def process(self, item: Item, scratch: Path) -> Output:
        record, times = item.inputs["shard"], Times()
        with times("read"):
            samples = list(tars.read(self.dataset.fetch("shards", file_of(record, ".tar"), check=True)))
            candidates = self._candidates(record, samples)
        ledger: list[Entry] = []
        for sample, vectors in zip(samples, candidates, strict=True):
            known = [vector for vector in vectors.of_name if self._has_direction(vector)]
            if vectors.of_name and not known:
                ledger.append(Entry(sample["__key__"], "not_finite", "row of zeros", kept=True))
            elif not known:
                ledger.append(Entry(sample["__key__"], "not_adopted", "row of zeros", kept=True))
            vectors.of_name = known
        with times("forward"):
            rows, undecodable = self._settle(record, samples, candidates)
        ledger += [Entry(key, "undecodable", "row of zeros", kept=True) for key in undecodable]
        out = scratch / "embeddings.npy"
        np.save(out, rows, allow_pickle=False)
        return Output(samples=len(rows), files={f"{item.id}.npy": out}, ledger=ledger, times=dict(times.seconds))

    def _candidates(self, record: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list["SampleVectors"]:
        """The vectors that may be those of each sample of a shard."""
        if list_archives(self.source):
            rows = Archives.open_cached(self.source).rows(self._rows(record, samples))
            return [SampleVectors([] if vector is None else [vector]) for vector in rows]
        folder = VectorsByName.open_cached(self.source)
        recurring = RecurringKeys.open_cached(self.dataset, self.dataset.identity("shards")["digest"])
        hashes = [row["sha256"] for row in metadata(self.dataset, record, ["sha256"])]
        candidates = []
        for sample, sha256 in zip(samples, hashes, strict=True):
            places, exact = folder.find(sample["__key__"])
            settled = len(places) < 2 and not recurring.has(sample["__key__"], exact=exact)
            same = [] if settled else [place for place in places if sha256 and folder.sha256(place) == sha256]
            vectors = [folder.vector(place) for place in same or places]
            settled |= bool(same) and all(np.array_equal(vector, vectors[0]) for vector in vectors)
            candidates.append(SampleVectors(vectors, settled))
        return candidates

    def _has_direction(self, vector: np.ndarray) -> bool:
        dim = describe_encoder(self.config.clip())["dim"]
        if vector.shape != (dim,):
            raise ValueError(f"{self.source} has vectors of {vector.size} numbers, {self.config.model} makes {dim}\n"
                             f"hint: --model and --pretrained as when they were made")
        length = np.linalg.norm(vector.astype(np.float32))
        return bool(np.isfinite(length) and length > 0)

    def _settle(self, record: dict[str, Any], samples: Sequence[dict[str, Any]], candidates: list["SampleVectors"]
                ) -> tuple[np.ndarray, list[str]]:
        """The unit vectors of a shard, (N_i, D) float16, and the keys whose image should choose but does not decode.

        ValueError if a vector is not that of its image.
        """
        sure = [row for row, vectors in enumerate(candidates) if vectors.settled and vectors.of_name]
        # Spread over the shard: vectors in another order may begin well.
        probes = {sure[place] for place in np.linspace(0, len(sure) - 1, min(PROBES, len(sure))).astype(int)}
        unsure = {row for row, vectors in enumerate(candidates) if not vectors.settled and vectors.of_name}
        checked = sorted(probes | unsure)
        encoder = clip.load_encoder(self.config.clip())
        rows, undecodable, worst = np.zeros((len(samples), encoder.dim), np.float16), [], (1.0, 0)
        encoded = encode_images(encoder, [tars.sample_image(samples[row]) for row in checked], self.config.batch_size)
        for row in sure:
            rows[row] = unit_rows(candidates[row].of_name[0])
        for row, own in zip(checked, encoded, strict=True):
            if own is None:
                undecodable += [samples[row]["__key__"]] if row in unsure else []
                continue
            vectors = unit_rows(np.stack(candidates[row].of_name))
            cosines = vectors.astype(np.float32) @ own
            rows[row] = vectors[cosines.argmax()]
            worst = min(worst, (float(cosines.max()), row))
        if worst[0] < LEAST_COSINE:
            cosine, row = worst
            raise ValueError(f"the vectors of {self.source} do not fit shard {record['id']}: row {row}, "
                             f"{samples[row]['__key__']}: expected a cosine of at least {LEAST_COSINE} to the vector "
                             f"of {self.config.model} ({self.config.pretrained}), got {cosine:.3f}\n"
                             f"hint: --model and --pretrained of the encoder that made them, and the same images")
        _log.info("embed: shard %s: %d of %d images encoded again, %d of them because others share their names; least "
                  "cosine %.4f", record["id"], len(checked), len(samples), len(unsure), worst[0])
        return rows, undecodable

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        totals = stage_records.totals(records)
        if totals["samples"] and totals["noted"].get("not_adopted", 0) == totals["samples"]:
            raise StageFailed(f"embed: none of the {totals['samples']} samples has a vector in {self.source}\n"
                              f"hint: are these the vectors of {self.dataset.label}? --overwrite adopts others")
        return super().finish(records, scratch)

    def _rows(self, record: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The metadata of the samples of a shard, as far as archives tell images and patches apart by it."""
        entry = file_of(record, ".parquet")
        there = set(pq.read_schema(self.dataset.fetch("shards", entry)).names)
        rows = metadata(self.dataset, record, [name for name in ROW_NUMBER if name in there])
        if [row["key"] for row in rows] != [sample["__key__"] for sample in samples]:
            raise DamagedFile(f"shard {record['id']} does not have the samples that its parquet names\n"
                              f"hint: python -m jobs verify")
        return rows


@dataclass
class SampleVectors:
    """The vectors that may be those of a sample."""

    of_name: list[np.ndarray]
    """The vectors whose name belongs to the key of the sample, (D,) each."""
    settled: bool = True
    """Whether it can only be the first."""


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) as float16 of unit length."""
    rows = vectors.astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float16)


def encode_images(encoder: clip.Encoder, images: Sequence[bytes], size: int) -> list[np.ndarray | None]:
    """The unit vector (D,) float32 of each encoded image, None if it does not decode; `size`: images at a time."""
    vectors: list[np.ndarray | None] = [None] * len(images)
    with ThreadPoolExecutor(count_cores()) as pool:
        for start in range(0, len(images), size):
            parts = list(pool.map(lambda image: decode_images([image], encoder.prepared).pictures,
                                  images[start:start + size]))
            there = [place for place, part in enumerate(parts) if part is not None]
            if there:
                rows = encoder.fit(np.concatenate([part for part in parts if part is not None]), len(there),
                                   lambda part, _: encoder.images(part), np.concatenate)
                for place, row in zip(there, rows, strict=True):
                    vectors[start + place] = row
    return vectors
