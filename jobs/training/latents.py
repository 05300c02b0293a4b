"""Shards -> latents of a first stage: row i of 000042.npy is sample i of 000042.tar."""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from jobs.runs.run import Run
from jobs.training.config import LatentsConfig
from model.weights import first_stage
from model.weights.first_stage import FirstStage
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.embeddings.hub import is_offered
from pipeline.hardware import devices
from pipeline.media import tars
from pipeline.media.resize import decode_pixels
from pipeline.stages.documents import NUMBER
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output
from pipeline.storage import DamagedFile

IN_THE_RUN = "first_stage"  # the source of a first stage that lies in the folder of its run


class Latents(Stage):
    """The stage from the shards of a dataset to latents/, (N_i, A, C, h, w) float16, scaled; A is 2 with flips."""

    name = "latents"
    record_info: ClassVar[dict[str, Any]] = {"shape": [int], "scale": NUMBER}
    workers_need_gpu = True

    def __init__(self, dataset: Dataset, config: LatentsConfig) -> None:
        if not config.first_stage:
            raise ValueError("latents need a first stage\nhint: --first-stage FOLDER, or a name in the hub")
        super().__init__(dataset.root, dataset.path("latents"), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return f"{self.dataset.command('latents')} --first-stage {storage.quote(self.config.first_stage)}"

    def section(self) -> dict[str, Any]:
        # The folder may be elsewhere on another machine; what is in it is in the digest.
        return {"first_stage": weights_digest(open_first_stage(self.config.first_stage)), "flips": self.config.flips,
                "scale": self.config.scale}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.dataset.identity("shards")}

    def plan(self) -> list[Item]:
        scale, wanted = self._scale(), weights_digest(open_first_stage(self.config.first_stage))
        return [Item(record["id"], {"shard": record, "scale": scale, "count": record["samples"], "first_stage": wanted})
                for record in self.dataset.manifest("shards")["items"]]

    def setup(self) -> None:
        # On a CPU the last bits depend on how a sum is split among threads.
        torch.set_num_threads(1)
        self.precision = devices.dtype_name(next(open_first_stage(self.config.first_stage).network.parameters()).dtype)

    def process(self, item: Item, scratch: Path) -> Output:
        stage, record = open_first_stage(self.config.first_stage), item.inputs["shard"]
        if weights_digest(stage) != item.inputs["first_stage"]:
            raise ValueError(f"the first stage {self.config.first_stage} is not that of the plan\n"
                             f"hint: the same files on every machine")
        parts = []
        for pictures in self._pictures(record):
            parts.append(_encode_latents(stage, pictures, item.inputs["scale"], self.config.flips))
            self.report_progress(rows=sum(map(len, parts)), samples=sum(map(len, parts)), length=0, skipped=Counter())
        latents = np.concatenate(parts) if parts else np.empty((0, 1 + self.config.flips, stage.channels, 1, 1),
                                                               np.float16)
        if len(latents) != record["samples"]:
            raise DamagedFile(f"shard {item.id} has {len(latents)} samples, its manifest says {record['samples']}\n"
                              f"hint: python -m jobs verify")
        if not np.isfinite(latents).all():
            raise ValueError(f"latents of shard {item.id} are not finite in float16\nhint: a smaller --scale")
        path = scratch / f"{item.id}.npy"
        np.save(path, latents, allow_pickle=False)
        return Output(samples=len(latents), files={path.name: path}, info={
            "shape": list(latents.shape[1:]), "scale": item.inputs["scale"]}, times=_fit.times())

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        shapes = {tuple(record["info"]["shape"]) for record in records if record["samples"]}
        if len(shapes) > 1:
            raise ValueError(f"the latents have different shapes: {sorted(shapes)}\n"
                             f"hint: shard with --resize center_crop")
        source = self.config.first_stage
        stage = open_first_stage(source)
        # A process of Ray Train has another working folder, so a relative path would be wrong there.
        source = os.path.abspath(source) if os.path.isdir(source) else source
        return Output(info={"first_stage": describe_first_stage(stage, source, records[0]["info"]["scale"]),
                            "shape": list(shapes.pop()) if shapes else None})

    def _scale(self) -> float:
        stage = open_first_stage(self.config.first_stage)
        if self.config.scale or stage.scale:
            return self.config.scale or stage.scale
        record = next((record for record in self.dataset.manifest("shards")["items"] if record["samples"]), None)
        if record is None:
            raise ValueError(f"{self.dataset.label} has no samples")
        deviation = float(_encode_latents(stage, next(self._pictures(record)), 1.0, False).astype(np.float32).std())
        return float(np.float32(1 / max(deviation, 1e-6)))

    def _pictures(self, record: dict[str, Any]) -> Any:
        """Batches (B, H, W, 3) uint8 of a shard, decoded while the last is encoded."""
        path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
        encoded = (tars.sample_image(sample) for sample in tars.read(path))
        with ThreadPoolExecutor(2) as pool:
            ahead = None
            while batch := list(itertools.islice(encoded, self.config.batch_size)):
                following = pool.submit(_decode_all, batch)
                if ahead:
                    yield ahead.result()
                ahead = following
            if ahead:
                yield ahead.result()


def _decode_all(images: Sequence[bytes]) -> np.ndarray:
    return np.stack([decode_pixels(image) for image in images])


def _encode_latents(stage: FirstStage, pictures: np.ndarray, scale: float, flips: bool) -> np.ndarray:
    """Latents (B, A, C, h, w) float16 of images (B, H, W, 3) uint8."""
    def encode(batch: np.ndarray, _: int) -> np.ndarray:
        x = (torch.from_numpy(batch).permute(0, 3, 1, 2).to(stage.device).float() / 127.5 - 1).contiguous()
        kinds = [x, x.flip(-1)] if flips else [x]
        return torch.stack([scale * stage.moments(kind)[0] for kind in kinds], 1).cpu().numpy().astype(np.float16)

    return _fit(pictures, len(pictures), encode, np.concatenate)


_fit = devices.BatchFit()  # of this process: it has one device


def open_first_stage(source: str) -> FirstStage:
    """The first stage of a folder or the hub, on the device of this process; kept in this process."""
    return open_first_stage_on(source, devices.choose_device())


@lru_cache(maxsize=1)
def open_first_stage_on(source: str, device: torch.device) -> FirstStage:
    """The first stage of a folder or the hub on a device; kept in this process."""
    with devices.explain_failures(f"the first stage {source} does not get onto the device"):
        return _load_first_stage(source, device)


def _load_first_stage(source: str, device: str | torch.device) -> FirstStage:
    """The first stage of a folder or the hub. ValueError also if the hub has no such name, or does not answer."""
    if not Path(source).exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):  # the client of the hub would ask for it for a minute
            raise ValueError(f"there is no autoencoder in {source}: expected a folder, or ORGANISATION/NAME of the hub"
                             f"\nhint: a folder with config.json and diffusion_pytorch_model.safetensors")
        is_offered(f"the first stage {source}", source, ("config.json",), "the folder", flag="--first-stage FOLDER")
    return first_stage.load(source, device)


def first_stage_of_run(run: Run, device: str = "") -> FirstStage | None:
    """The decoder of the latents of a run, with their factor. None if the run generates pixels.

    On a `device` it is one of the caller's own, otherwise that which this process keeps. Raises ValueError where there
    is none, or another one than the run was trained with.
    """
    known: dict[str, Any] | None = run.section().get("first_stage")
    if not known:
        return None
    source = str(run.first_stage()) if known["source"] == IN_THE_RUN else known["source"]
    stage = _load_first_stage(source, device) if device else open_first_stage(source)
    if weights_digest(stage) != known["sha256"]:
        raise ValueError(f"the first stage {known['source']} is not the one that the run {run.name} was trained with")
    return replace(stage, scale=known["scale"])


def save_first_stage(stage: FirstStage, folder: Path) -> None:
    """Write a first stage with its factor into a folder, as diffusers keeps it."""
    stage.network.register_to_config(scaling_factor=stage.scale)
    stage.network.save_pretrained(folder, safe_serialization=True)


def describe_first_stage(stage: FirstStage, source: str, scale: float) -> dict[str, Any]:
    """The description of a first stage in manifests. Sampling needs the same first stage."""
    return {"source": source, "kind": stage.kind, "channels": stage.channels, "factor": stage.factor, "scale": scale,
            "sha256": weights_digest(stage)}


def weights_digest(stage: FirstStage) -> str:
    """sha256 of the weights of a first stage, of their names and numbers."""
    weights_sha256 = _digests.get(stage.network)
    if weights_sha256 is None:
        sha = hashlib.sha256()
        for name, tensor in sorted(stage.network.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.cpu().contiguous().numpy().tobytes())
        weights_sha256 = _digests[stage.network] = sha.hexdigest()
    return weights_sha256


_digests: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
