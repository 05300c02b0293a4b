"""Shards -> CLIP embeddings: row i of 000042.npy is sample i of 000042.tar."""

import contextlib
import itertools
import json
import os
import platform
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import clip, images, tars
from pipeline.dataset import Dataset, file_of
from pipeline.stage import Entry, Item, Output, Stage


@dataclass(frozen=True)
class EmbedConfig(clip.ClipConfig):
    """Which encoder, and how many pictures at a time."""

    batch_size: int = 128
    """Pictures in one forward pass; on a CPU passes above 256 are slower per picture."""

    def clip(self) -> clip.ClipConfig:
        """The encoder alone."""
        return clip.ClipConfig(self.model, self.pretrained, self.precision)


class Embed(Stage):
    """The stage from the shards of a dataset to its embeddings, (N_i, D) float16 of unit length."""

    name = "embed"
    workers_need_gpu = True

    def __init__(self, dataset: Dataset, config: EmbedConfig) -> None:
        if config.batch_size < 1:
            raise ValueError(f"embed.batch_size must be at least 1, not {config.batch_size}")
        super().__init__(dataset.root, dataset.path("embeddings"), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return self.dataset.command("embeddings")

    def section(self) -> dict[str, Any]:
        # The path of the weights may differ from node to node; what they are is in the encoder's description.
        return {"precision": self.config.precision, "batch_size": self.config.batch_size,
                "encoder": clip.describe(self.config.clip())}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.dataset.identity("shards")}

    def plan(self) -> list[Item]:
        weights = clip.describe(self.config.clip())["weights_sha256"]
        return [Item(record["id"], {"shard": record, "weights": weights, "count": record["samples"]})
                for record in self.dataset.manifest("shards")["items"]]

    def setup(self) -> None:
        clip.load(self.config.clip())

    def process(self, item: Item, scratch: Path) -> Output:
        if clip.describe(self.config.clip())["weights_sha256"] != item.inputs["weights"]:
            raise ValueError(f"the weights {self.config.pretrained} on {platform.node()} are not those of the plan\n"
                             f"hint: the same file on every machine")
        encoder, record = clip.load(self.config.clip()), item.inputs["shard"]
        path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
        vectors = np.zeros((record["samples"], encoder.dim), np.float16)
        ledger, row = [], 0
        for keys, rows, encoded in _encoded(encoder, path, self.config.batch_size):
            if row + len(keys) > len(vectors):
                break
            vectors[[row + position for position in rows]] = encoded
            # A row of zeros marks what does not decode: what comes after must not move up.
            ledger += [Entry(key, "undecodable", "row of zeros", kept=True) for position, key in enumerate(keys)
                       if position not in set(rows)]
            row += len(keys)
        if row != len(vectors):
            raise ValueError(f"{path} does not have the {len(vectors)} samples that its manifest names\n"
                             f"hint: python -m jobs verify")
        out = scratch / "embeddings.npy"
        np.save(out, vectors, allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger)

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": clip.describe(self.config.clip())})


def _encoded(encoder: clip.Encoder, path: Path, size: int) -> Iterator[tuple[list[str], list[int], np.ndarray]]:
    """Keys of the samples of a tar in batches of `size`, positions of those that decode, their vectors.

    Each thread decodes, prepares and encodes whole batches, with one thread inside torch: how torch
    splits a sum among threads would change the last bits, and with them the bytes of the result.
    """
    import torch

    def one(samples: list[dict[str, Any]]) -> tuple[list[str], list[int], np.ndarray]:
        prepared = []
        for position, sample in enumerate(samples):
            with contextlib.suppress(images.BadPicture):
                picture = Image.fromarray(images.pixels(tars.picture(sample)))
                prepared.append((position, encoder.prepare(picture)))
        keys, rows = [sample["__key__"] for sample in samples], [position for position, _ in prepared]
        if not prepared:
            return keys, rows, np.zeros((0, encoder.dim), np.float32)
        return keys, rows, encoder.images(torch.stack([pixels for _, pixels in prepared]))

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[Future] = deque()
        samples = tars.read(path)
        while batch := list(itertools.islice(samples, size)):
            ahead.append(pool.submit(one, batch))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


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
