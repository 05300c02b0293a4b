"""Shards -> CLIP embeddings: row i of 000042.npy is sample i of 000042.tar.

Pictures are decoded by threads (their decoders do not hold the interpreter) while the encoder works: on a GPU one
batch is encoded while the next is decoded and the last is fetched; on CPUs every thread does small batches from end
to end, with one thread inside torch, for how torch splits a sum among threads would change the last bits, and with
them the bytes of the result.
"""

import itertools
import json
import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import clip, images, stage, tars
from pipeline.dataset import Dataset, file_of, metadata
from pipeline.stage import Entry, Item, Output, Stage

# Pictures in a forward pass on a CPU: more are no faster, and leave less for other threads to do.
_PART, _LEAST = 32, 8
_AHEAD = 4  # batches that are decoded, or being decoded, for each thread or beside a GPU


@dataclass(frozen=True)
class EmbedConfig(clip.ClipConfig):
    """Which encoder, and how many pictures at a time."""

    batch_size: int = 128
    """Pictures in one forward pass; on a CPU 32 at most."""
    compile: bool = False
    """Let torch.compile make the encoder faster, which takes a minute."""

    def clip(self) -> clip.ClipConfig:
        """The encoder alone."""
        return clip.ClipConfig(self.model, self.pretrained, self.precision)


class Embed(Stage):
    """The stage from the shards of a dataset to its embeddings, (N_i, D) float16 of unit length."""

    name = "embed"
    of = "embeddings"
    workers_need_gpu = True

    def __init__(self, dataset: Dataset, config: EmbedConfig) -> None:
        if config.batch_size < 1:
            raise ValueError(f"embed.batch_size must be at least 1, not {config.batch_size}")
        super().__init__(dataset.root, dataset.path(self.of), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return self.dataset.command(self.of)

    def section(self) -> dict[str, Any]:
        # The path of the weights may differ from node to node; what they are is in the encoder's description.
        section = {"precision": self.config.precision, "batch_size": self.config.batch_size,
                   "encoder": clip.describe(self.config.clip())}
        return section | ({"compile": True} if self.config.compile else {})

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.dataset.identity("shards")}

    def plan(self) -> list[Item]:
        encoder = stage.digest(clip.describe(self.config.clip()))
        return [Item(record["id"], {"shard": record, "encoder": encoder, "count": record["samples"]})
                for record in self.dataset.manifest("shards")["items"]]

    def setup(self) -> None:
        self._encoder()

    def process(self, item: Item, scratch: Path) -> Output:
        if stage.digest(clip.describe(self.config.clip())) != item.inputs["encoder"]:
            raise ValueError(f"the weights {self.config.pretrained} of {self.config.model} on {platform.node()}, or "
                             f"its settings, are not those of the plan\nhint: the same files on every machine")
        encoder, record, used = self._encoder(), item.inputs["shard"], time.process_time()
        vectors = np.zeros((record["samples"], encoder.dim), np.float16)
        ledger, row, times = [], 0, Times()
        for keys, rows, encoded in self._batches(encoder, record, times):
            if row + len(keys) > len(vectors):
                row += len(keys)
                break
            vectors[[row + position for position in rows]] = encoded
            ledger += [Entry(keys[position], "no_direction", "row of zeros", kept=True) for position in rows
                       if not vectors[row + position].any()]
            # A row of zeros marks what does not decode: what comes after must not move up.
            ledger += [Entry(key, "undecodable", "row of zeros", kept=True) for position, key in enumerate(keys)
                       if position not in set(rows)]
            row += len(keys)
            self.beat(rows=row, samples=row - len(ledger), length=0, skipped={})
        if row != len(vectors):
            raise ValueError(f"shard {record['id']} does not have the {len(vectors)} samples that its manifest names\n"
                             f"hint: python -m jobs verify")
        if not np.isfinite(vectors).all():
            broken = int((~np.isfinite(vectors)).any(1).sum())
            raise ValueError(f"{broken} vectors of shard {record['id']} are not finite: {self.config.model} does not "
                             f"bear this precision\nhint: --precision fp32")
        with times("write"):
            out = scratch / "embeddings.npy"
            np.save(out, vectors, allow_pickle=False)
        times.seconds["cpu"] = time.process_time() - used
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger,
                      times=times.seconds | {"precision": str(encoder.dtype).removeprefix("torch.")})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": clip.describe(self.config.clip())})

    def _encoder(self) -> clip.Encoder:
        return clip.load(self.config.clip(), True) if self.config.compile else clip.load(self.config.clip())

    def _batches(self, encoder: clip.Encoder, record: dict[str, Any], times: "Times") -> Iterator["Batch"]:
        with times("read"):
            path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
        yield from _encoded(encoder, tars.read(path), record["samples"], self.config.batch_size, times)


class EmbedCaptions(Embed):
    """The stage from the captions of a dataset to its text embeddings, of the same rows and form."""

    name = "embed_captions"
    of = "text_embeddings"

    def _batches(self, encoder: clip.Encoder, record: dict[str, Any], times: "Times") -> Iterator["Batch"]:
        def work(some: list[dict[str, Any]]) -> Batch:
            # A sample without a caption gets a row of zeros: the vector of no words is near to everything.
            there = [position for position, row in enumerate(some) if (row["caption"] or "").strip()]
            with times("forward"):
                return ([row["key"] for row in some], there,
                        encoder.texts([some[position]["caption"] for position in there]) if there else 0)

        with times("read"):
            rows = metadata(self.dataset, record, ["key", "caption"])
        with _pool() as (pool, threads):
            yield from _in_order(pool, work, _chunks(rows, _part(len(rows), self.config.batch_size), times),
                                 2 * threads, times)


Batch = tuple[list[str], list[int], Any]
"""Keys of some samples in order, the positions among them of those that have a vector, and these (n, D)."""


@dataclass
class Times:
    """Seconds spent with this and that, all threads together; `wait` is an encoder without work, `cpu` what the
    process used meanwhile.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count the time inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[what] += time.perf_counter() - started


def _part(count: int, size: int) -> int:
    """How many of `count` samples make a forward pass on a CPU: as even as can be, and two passes if there is enough.

    Of the number of threads it knows nothing, for the last bits of a vector may depend on the pictures beside it.
    """
    passes = max(-(-count // min(size, _PART)), min(2, count // _LEAST), 1)
    return -(-count // passes) or 1


def _encoded(encoder: clip.Encoder, samples: Iterable[dict[str, Any]], count: int, size: int,
             times: Times) -> Iterator[Batch]:
    """The vectors of `count` samples in batches of `size`, on a CPU in smaller ones."""
    alone = encoder.device.type == "cpu"

    def prepare(some: list[dict[str, Any]]) -> tuple[list[str], list[int], np.ndarray | None]:
        with times("decode"):
            prepared = [(position, one) for position, sample in enumerate(some)
                        if (one := _prepared(encoder, sample)) is not None]
            return ([sample["__key__"] for sample in some], [position for position, _ in prepared],
                    np.stack([one for _, one in prepared]) if prepared else None)

    def whole_way(some: list[dict[str, Any]]) -> Batch:
        keys, rows, pictures = prepare(some)
        with times("forward"):
            return keys, rows, 0 if pictures is None else encoder.launch(pictures, part)[:len(pictures)].numpy()

    with _pool() as (pool, threads):
        # Beside a GPU a batch is decoded by all threads at once.
        part = _part(count, size) if alone else max(1, -(-size // threads))
        decoded = _in_order(pool, whole_way if alone else prepare, _chunks(samples, part, times),
                            2 * threads if alone else _AHEAD * threads, times)
        yield from decoded if alone else _on_gpu(encoder, decoded, size, times)


@contextmanager
def _pool() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads, one inside torch for each, and their number."""
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool, threads


def _prepared(encoder: clip.Encoder, sample: dict[str, Any]) -> np.ndarray | None:
    try:
        return encoder.prepared(tars.picture(sample))
    except images.BadPicture:
        return None


def _chunks(samples: Iterable[dict[str, Any]], size: int, times: Times) -> Iterator[list[dict[str, Any]]]:
    source = iter(samples)
    while True:
        with times("read"):
            some = list(itertools.islice(source, size))
        if not some:
            return
        yield some


def _in_order(pool: ThreadPoolExecutor, work: Any, chunks: Iterator[Any], ahead: int, times: Times) -> Iterator[Any]:
    """What `work` makes of each chunk, in their order, up to `ahead` at once."""
    going: deque[Future] = deque()
    for chunk in chunks:
        going.append(pool.submit(work, chunk))
        if len(going) >= ahead:
            with times("wait"):
                done = going.popleft().result()
            yield done
    while going:
        with times("wait"):
            done = going.popleft().result()
        yield done


def _on_gpu(encoder: clip.Encoder, decoded: Iterator[Any], size: int, times: Times) -> Iterator[Batch]:
    """Batches of `size` from decoded parts; the vectors of one are fetched while the next is under way."""
    going: tuple[list[str], list[int], Any] | None = None

    def fetched(batch: tuple[list[str], list[int], Any]) -> Batch:
        keys, rows, vectors = batch
        with times("forward"):
            return keys, rows, 0 if vectors is None else vectors[:len(rows)].cpu().numpy()

    for parts in _gathered(decoded, size):
        keys = [key for part in parts for key in part[0]]
        starts = itertools.accumulate((len(part[0]) for part in parts), initial=0)
        rows = [start + position for start, part in zip(starts, parts, strict=False) for position in part[1]]
        pictures = [part[2] for part in parts if part[2] is not None]
        with times("forward"):
            vectors = encoder.launch(np.concatenate(pictures), size) if pictures else None
        if going:
            yield fetched(going)
        going = keys, rows, vectors
    if going:
        yield fetched(going)


def _gathered(decoded: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Parts together as long as they have no more than `size` samples."""
    parts: list[Any] = []
    for part in decoded:
        if parts and sum(len(one[0]) for one in parts) + len(part[0]) > size:
            yield parts
            parts = []
        parts.append(part)
    if parts:
        yield parts


def encoder_of(dataset: Dataset) -> dict[str, Any]:
    """The description of the encoder that made a dataset's embeddings."""
    return dataset.manifest("embeddings")["info"]["encoder"]


def same_encoder(one: Dataset, other: Dataset) -> None:
    """ValueError unless two datasets were embedded by the same encoder, naming what differs."""
    first, second = encoder_of(one), encoder_of(other)
    if first != second:
        differing = [f"{key} ({json.dumps(first.get(key))} / {json.dumps(second.get(key))})"
                     for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
        raise ValueError(f"{one.label} and {other.label} were embedded by different encoders: they differ in "
                         f"{', '.join(differing)}\nhint: embed both with the same --model and --pretrained")
