"""Shards -> CLIP embeddings: row i of 000042.npy is sample i of 000042.tar."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import clip, images, tars
from pipeline.dataset import Dataset, file_of
from pipeline.stage import Entry, Item, Output, Plan, Stage


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
        return {"precision": self.config.precision, "encoder": clip.describe(self.config.clip())}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.dataset.identity("shards")}

    def plan(self) -> Plan:
        return Plan([Item(record["id"], {"shard": record}) for record in self.dataset.manifest("shards")["items"]])

    def setup(self) -> None:
        clip.load(self.config.clip())

    def process(self, item: Item, scratch: Path) -> Output:
        encoder, record = clip.load(self.config.clip()), item.inputs["shard"]
        path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
        vectors = np.zeros((record["samples"], encoder.dim), np.float32)
        ledger, row, keys = [], 0, []
        with ThreadPoolExecutor(2) as pool:
            waiting: list[tuple[int, torch.Tensor]] = []
            for prepared, sample in _prepared(pool, encoder, path):
                keys.append(sample["__key__"])
                if row >= len(vectors):
                    break
                if prepared is None:
                    # A row of zeros marks it: what comes after must not move up.
                    ledger.append(Entry(sample["__key__"], "undecodable", "row of zeros", kept=True))
                else:
                    waiting.append((row, prepared))
                row += 1
                if len(waiting) == self.config.batch_size:
                    _encode(encoder, waiting, vectors)
            _encode(encoder, waiting, vectors)
        if len(keys) != len(vectors):
            raise ValueError(f"{path} does not have the {len(vectors)} samples that its manifest names\n"
                             f"hint: python -m jobs verify")
        out = scratch / "embeddings.npy"
        np.save(out, vectors.astype(np.float16), allow_pickle=False)
        return Output(samples=len(vectors), files={f"{item.id}.npy": out}, ledger=ledger)

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": clip.describe(self.config.clip())})


def _prepared(pool: ThreadPoolExecutor, encoder: clip.Encoder, path: Path) -> Any:
    """(preprocessed picture or None, sample) of a tar in order, a bounded number ahead of the encoder."""
    def one(sample: dict[str, Any]) -> torch.Tensor | None:
        try:
            return encoder.prepare(Image.fromarray(images.pixels(tars.picture(sample))))
        except images.BadPicture:
            return None

    ahead = []
    for sample in tars.read(path):
        ahead.append((pool.submit(one, sample), sample))
        if len(ahead) > 256:
            future, first = ahead.pop(0)
            yield future.result(), first
    for future, sample in ahead:
        yield future.result(), sample


def _encode(encoder: clip.Encoder, waiting: list[tuple[int, torch.Tensor]], vectors: np.ndarray) -> None:
    if waiting:
        rows, pixels = zip(*waiting, strict=True)
        vectors[list(rows)] = encoder.images(torch.stack(pixels))
        waiting.clear()


def encoder_of(dataset: Dataset) -> dict[str, Any]:
    """The description of the encoder that made a dataset's embeddings."""
    return dataset.manifest("embeddings")["info"]["encoder"]


def same_encoder(one: Dataset, other: Dataset) -> None:
    """ValueError unless two datasets were embedded by the same encoder, naming what differs."""
    first, second = encoder_of(one), encoder_of(other)
    if first != second:
        differing = [key for key in first if first[key] != second.get(key)]
        raise ValueError(f"{one.label} and {other.label} were embedded by different encoders: they differ in "
                         f"{', '.join(f'{key} ({json.dumps(first[key])} / {json.dumps(second.get(key))})' for key in differing)}"
                         f"\nhint: embed both with the same --model and --pretrained")
