"""Shards -> CLIP embeddings: row i of 000042.npy is sample i of 000042.tar.

encode_shards.py turns images into vectors. This stage takes shards one by one. An encoder with batches of one size
takes several shards together. Each shard gets its own file and record.
"""

import json
import platform
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import describe_encoder
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.encode_shards import (
    MemoryPlan,
    ShardInput,
    ShardPart,
    encode_parts,
    map_in_order,
    plan_memory,
    read_chunks,
    samples_per_pass,
    torch_threads,
)
from pipeline.formats.sizes import parse_size
from pipeline.hardware import devices
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.storage import DamagedFile

_TOGETHER = 16  # batches for shards that are encoded together: at most one is not full
_MOST = 64  # shards that are encoded together: a worker that dies loses so many


class Embed(Stage):
    """The stage from the shards of a dataset to its embeddings, (N_i, D) float16 of unit length."""

    name = "embed"
    output_folder = "embeddings"
    workers_need_gpu = True
    decodes = True
    no_row: ClassVar[str] = "undecodable"  # reason code of a sample that has nothing to encode

    def __init__(self, dataset: Dataset, config: EmbedConfig) -> None:
        super().__init__(dataset.root, dataset.path(self.output_folder), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return self.dataset.command(self.output_folder)

    def section(self) -> dict[str, Any]:
        # The path of the weights may differ from node to node; what they are is in the encoder's description.
        section = {"precision": self.config.precision, "batch_size": self.config.batch_size,
                   "encoder": describe_encoder(self.config.clip())}
        return section | ({"compile": True} if self.config.compile else {})

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.dataset.identity("shards")}

    def plan(self) -> list[Item]:
        encoder = storage.digest(describe_encoder(self.config.clip()))
        records = self.dataset.manifest("shards")["items"]
        self._room(map(_size, records), whole=False, threads=1)
        return [Item(record["id"], {"shard": record, "encoder": encoder, "count": record["samples"]})
                for record in records]

    def setup(self) -> None:
        self._encoder()

    def together(self, gpu: bool | None = None) -> int:
        if not (self._encoder().whole if gpu is None else gpu):
            return 1  # on a CPU a batch is no more than a part of a shard
        totals = self.dataset.manifest("shards")["totals"]
        each = -(-max(1, totals["samples"]) // totals["items"])
        self._room([(each, totals["bytes"] // totals["items"])], whole=True, threads=1)
        return min(_MOST, -(-_TOGETHER * self.config.batch_size // each))

    def process(self, item: Item, scratch: Path) -> Output:
        with closing(self.process_together([(item, scratch)])) as outputs:
            output = next(outputs)
        if isinstance(output, Exception):
            raise output
        return output

    def process_together(self, work: Sequence[tuple[Item, Path]]) -> Generator[Output | Exception, None, None]:
        if any(storage.digest(describe_encoder(self.config.clip())) != item.inputs["encoder"] for item, _ in work):
            raise ValueError(f"the weights {self.config.pretrained} of {self.config.model} on {platform.node()}, or "
                             f"its settings, are not those of the plan\nhint: the same files on every machine")
        encoder, times = self._encoder(), Times()
        with closing(self._parts(encoder, [item.inputs["shard"] for item, _ in work], times)) as parts:
            for (item, scratch), (_, own) in zip(work, groupby(parts, lambda part: part.shard), strict=True):
                try:
                    yield self._output(item, scratch, own, encoder, times)
                except StageFailed:  # the driver's own, from `on_progress`
                    raise
                except Exception as error:
                    yield error

    def _output(self, item: Item, scratch: Path, parts: Iterable[ShardPart], encoder: clip.Encoder, times: Times
                ) -> Output:
        """The file of one shard, of its parts."""
        record = item.inputs["shard"]
        vectors = np.zeros((record["samples"], encoder.dim), np.float16)
        ledger, row = [], 0
        for part in parts:
            if part.error:
                raise part.error
            if row + len(part.keys) > len(vectors):
                row += len(part.keys)
                break
            if part.rows is not None:
                vectors[[row + position for position in part.there]] = part.rows
            ledger += [Entry(part.keys[position], "no_direction", "row of zeros", kept=True) for position in part.there
                       if not vectors[row + position].any()]
            # A row of zeros marks what does not decode: what comes after must not move up.
            ledger += [Entry(key, self.no_row, "row of zeros", kept=True) for position, key in enumerate(part.keys)
                       if position not in set(part.there)]
            row += len(part.keys)
            self.report_progress(rows=row, samples=row - len(ledger), length=0, skipped=Counter())
        if row != len(vectors):
            raise DamagedFile(f"shard {record['id']} does not have the {len(vectors)} samples that its manifest names\n"
                              f"hint: python -m jobs verify")
        if not np.isfinite(vectors).all():
            broken = int((~np.isfinite(vectors)).any(1).sum())
            raise ValueError(f"{broken} vectors of shard {record['id']} are not finite: {self.config.model} does not "
                             f"bear this precision\nhint: --precision fp32")
        with times("write"):
            out = scratch / "embeddings.npy"
            np.save(out, vectors, allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger,
                      times=times.pop_seconds() | {"precision": str(encoder.dtype).removeprefix("torch.")} |
                      encoder.fit.times())

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": describe_encoder(self.config.clip())})

    def _encoder(self) -> clip.Encoder:
        compiled = {"compiled": True} if self.config.compile else {}
        encoder = clip.load_encoder(self.config.clip(), **compiled)
        self.precision = devices.dtype_name(encoder.dtype)
        return encoder

    def _parts(self, encoder: clip.Encoder, records: Sequence[dict[str, Any]], times: Times
               ) -> Generator[ShardPart, None, None]:
        parts_in_flight = self.decode.at_once if self.decode else 0
        room = self._room(map(_size, records), whole=encoder.whole, parts_in_flight=parts_in_flight)
        shards = [self._shard(record) for record in records]
        return encode_parts(encoder, shards, self.config.batch_size, room, self.decode, times)

    def _shard(self, record: dict[str, Any]) -> ShardInput:
        entry = file_of(record, ".tar")
        url = storage.manifest_file_url(self.dataset.folder("shards"), entry["name"])
        return ShardInput(record["samples"],
                     lambda: storage.fetch_and_open(url, entry, lambda path: path.open("rb"), check=True))

    def _room(self, sizes: Iterable[tuple[int, int]], *, whole: bool, parts_in_flight: int = 0, threads: int = 0
              ) -> MemoryPlan:
        return plan_memory(parse_size(self.config.max_memory, "embed.max_memory"), self.config.clip(), sizes,
                             self.config.batch_size, whole=whole, parts_in_flight=parts_in_flight, threads=threads)


class EmbedCaptions(Embed):
    """The stage from the captions of a dataset to its text embeddings, of the same rows and form."""

    name = "embed_captions"
    output_folder = "text_embeddings"
    decodes = False
    no_row = "no_caption"

    def together(self, gpu: bool | None = None) -> int:
        return 1

    def _parts(self, encoder: clip.Encoder, records: Sequence[dict[str, Any]], times: Times
               ) -> Generator[ShardPart, None, None]:
        def work(part: tuple[int, list[dict[str, Any]]]) -> ShardPart:
            # A sample without a caption gets a row of zeros: the vector of no words is near to everything.
            number, samples = part
            there = [position for position, row in enumerate(samples) if (row["caption"] or "").strip()]
            with times("forward"):
                texts = [samples[position]["caption"] for position in there]
                return ShardPart(number, [row["key"] for row in samples], there=there, rows=encoder.fit(
                    texts, len(texts), lambda part, _: encoder.texts(part), np.concatenate) if there else None)

        threads = self._room(map(_size, records), whole=False).threads
        with torch_threads(threads) as pool:
            for number, record in enumerate(records):
                with times("read"):
                    rows = metadata(self.dataset, record, ["key", "caption"])
                size = samples_per_pass(len(rows), self.config.batch_size)
                source = ((number, samples) for samples in read_chunks(rows, size, times))
                yield from map_in_order(pool, work, source, 2 * threads, times)
                yield ShardPart(number)


def _size(record: dict[str, Any]) -> tuple[int, int]:
    """Samples and bytes of a shard."""
    return record["samples"], file_of(record, ".tar")["bytes"]


def dataset_encoder(dataset: Dataset) -> dict[str, Any]:
    """The description of the encoder that made a dataset's embeddings."""
    return dataset.manifest("embeddings")["info"]["encoder"]


def check_same_encoder(first_dataset: Dataset, second_dataset: Dataset) -> None:
    """ValueError unless two datasets were embedded by the same encoder, naming what differs."""
    first, second = dataset_encoder(first_dataset), dataset_encoder(second_dataset)
    if first != second:
        differing = [f"{key} ({json.dumps(first.get(key))} / {json.dumps(second.get(key))})"
                     for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
        raise ValueError(f"{first_dataset.label} and {second_dataset.label} were embedded by different encoders: they "
                         f"differ in {', '.join(differing)}\nhint: embed both with the same --model and --pretrained")
