"""Data of a measurement: images like photographs, vectors in clusters, and steps on random numbers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model.config import GROUPS, TrainConfig, to_dict
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.hardware import devices
from pipeline.hardware.memory import machine_memory
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

_PICTURES_AN_ITEM = 25
_WIDTH, _HEIGHT = 1440, 1080
_CLUSTERS = 100
_BYTES_A_PARAMETER = 20  # weights, gradients, their two moments, the average
_MOST_STEPS = 50


class Photographs(Stage):
    """The stage to a folder of JPEGs of 1.5 megapixels with detail at all scales, as photographs have it."""

    name = "photographs"

    def __init__(self, folder: str, count: int) -> None:
        root, _, name = folder.rpartition("/")
        super().__init__(root, name, None)
        self.count = count

    def section(self) -> dict[str, Any]:
        return {"count": self.count}

    def plan(self) -> list[Item]:
        return [Item(f"{start:06d}", {"count": min(_PICTURES_AN_ITEM, self.count - start)})
                for start in range(0, self.count, _PICTURES_AN_ITEM)]

    def process(self, item: Item, scratch: Path) -> Output:
        rng = np.random.default_rng(int(item.id))
        fields = np.stack([_octaves(rng) for _ in range(3)], -1)
        output = Output(samples=item.inputs["count"])
        for number in range(item.inputs["count"]):
            # The same noise at another place, in other colors: new noise would take longer than the measured stage.
            moved = np.roll(fields, tuple(rng.integers(_HEIGHT, size=2)), (0, 1))
            pixels = 128 + 20 * moved @ rng.normal(size=(3, 3)).astype(np.float32)
            name = f"{item.id}-{number:02d}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(scratch / name, quality=88)
            output.files[name] = scratch / name
        return output


def _octaves(rng: np.random.Generator) -> np.ndarray:
    """Noise with about the same power in each octave but the finest three, deviation 1: (H, W) float32."""
    total = np.zeros((_HEIGHT, _WIDTH), np.float32)
    for level in range(9):
        small = Image.fromarray(rng.standard_normal((_HEIGHT >> level, _WIDTH >> level), np.float32))
        weight = (0.15, 0.3, 0.6)[level] if level < 3 else 1.0  # a lens blurs the finest detail
        total += weight * np.asarray(small.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC))
    return total / total.std()


class Vectors(Stage):
    """The stage to embeddings/, or the metadata in shards/, of a dataset of unit vectors around random centers."""

    name = "made"

    def __init__(self, dataset: Dataset, folder: str, counts: list[int], dim: int, seed: int) -> None:
        super().__init__(dataset.root, dataset.path(folder), None)
        self.of, self.counts, self.dim, self.seed = folder, counts, dim, seed

    def section(self) -> dict[str, Any]:
        return {"of": self.of, "counts": self.counts, "dim": self.dim, "seed": self.seed}

    def plan(self) -> list[Item]:
        return [Item(f"{number:06d}", {"count": count}) for number, count in enumerate(self.counts)]

    def process(self, item: Item, scratch: Path) -> Output:
        count = item.inputs["count"]
        if self.of == "shards":
            path = scratch / f"{item.id}.parquet"
            keys = [f"{self.seed}-{item.id}-{row:07d}" for row in range(count)]
            pq.write_table(pa.table({"sha256": [storage.short_hash(key).ljust(64, "0") for key in keys], "key": keys,
                                     "status": ["success"] * count}), path)
        else:
            path = scratch / f"{item.id}.npy"
            centres = np.random.default_rng(0).standard_normal((_CLUSTERS, self.dim), np.float32)
            rng = np.random.default_rng([self.seed, int(item.id)])
            rows = centres[rng.integers(_CLUSTERS, size=count)] + 0.8 * rng.standard_normal(
                (count, self.dim), np.float32)
            np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
        return Output(samples=count, files={path.name: path})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={"encoder": {"model": "made", "weights_sha256": "", "dim": self.dim}})


def make_vectors(run: Callable[[Stage], Any], root: str, name: str, count: int, dim: int, *, parts: int,
            seed: int = 0) -> Dataset:
    """A sealed dataset of `count` random vectors, without images."""
    dataset = Dataset.parse(root, name)
    counts = [count * (part + 1) // parts - count * part // parts for part in range(parts)]
    for folder in ("shards", "embeddings"):
        run(Vectors(dataset, folder, counts, dim, seed))
    return dataset


class Steps(Stage):
    """The stage of some updates of a network on random numbers, in each worker, and its rate.

    A network that does not fit into memory is halved in width, and so on. Gradients are not exchanged.
    """

    name = "steps"
    workers_need_gpu = True

    def __init__(self, folder: str, config: TrainConfig, side: int, batch: int, seconds: float, workers: int) -> None:
        root, _, name = folder.rpartition("/")
        super().__init__(root, name, config)
        self.side, self.batch, self.seconds, self.workers = side, batch, seconds, workers

    def section(self) -> dict[str, Any]:
        return {"train": to_dict(self.config), "side": self.side, "batch": self.batch, "seconds": self.seconds}

    def plan(self) -> list[Item]:
        return [Item(f"{number:06d}") for number in range(self.workers)]

    def process(self, item: Item, scratch: Path) -> Output:
        import torch

        from model.training import flops
        device = devices.choose_device()
        cuda = device.type == "cuda"
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        torch.set_num_threads(threads)
        memory = torch.cuda.mem_get_info()[0] if cuda else machine_memory() // self.workers
        config = replace(self.config, own="none", image_size=0, ema_more=(), validate_every=0)
        # An update needs the activations too, and a CPU without memory ends the process instead of raising.
        while _BYTES_A_PARAMETER * flops.size(config.unet, self.side, config.k).parameters > memory / 2:
            config = _narrow_network(config)
        took, batch, steps = 0.0, 0, 0
        while not took:
            try:
                each = self._seconds(config, 1, 2, device)
                batch = max(1, min(batch or self.batch, int(self.seconds / 5 / each)))
                steps = max(3, min(_MOST_STEPS, int(self.seconds / each / batch)))
                took = self._seconds(config, batch, steps, device)
            except MemoryError:
                config, batch = (config, batch // 2) if batch > 1 else (_narrow_network(config), 0)
        size = flops.size(config.unet, self.side, config.k)
        return Output(samples=batch * steps, info={
            "flop_per_s": batch * size.training(config.unet.checkpointing) / took, "parameters": size.parameters,
            "batch": batch, "threads": threads, "device": torch.cuda.get_device_name() if cuda else _processor_name()})

    def _seconds(self, config: TrainConfig, batch: int, steps: int, device: Any) -> float:
        """Seconds of an update on `batch` images. The first update does not count, because it allocates memory."""
        from model.training.train import train
        config = replace(config, steps=steps, global_batch=batch, accumulate=min(config.accumulate, batch),
                         log_every=1, checkpoint_every=steps)
        rng = np.random.default_rng(0)
        unet, times = config.unet, []
        batch_data = {"latent": rng.standard_normal((batch, unet.in_channels, self.side, self.side), np.float32)
                      .astype(np.float16),
                      "neighbors": rng.standard_normal((batch, config.k, unet.context_dim), np.float32)
                      .astype(np.float16)}
        train(config, lambda step: batch_data, device=device, save=lambda *_: None,
              log=lambda record: times.append(record["seconds"]))
        return max(1e-9, (times[-1] - times[0]) / (len(times) - 1))


def _narrow_network(config: TrainConfig) -> TrainConfig:
    """The network with half the channels. Raises MemoryError if no such network exists."""
    wide = config.unet.model_channels // 2 // GROUPS * GROUPS
    if not wide or wide % config.unet.head_dim:
        raise MemoryError("no network of this shape fits into the memory of a worker\nhint: --rates for training")
    return replace(config, unet=replace(config.unet, model_channels=wide))


def _processor_name() -> str:
    """The model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform
        return platform.machine()
