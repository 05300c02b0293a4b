"""A checkpoint of the CompVis release -> a run for sampling: its UNet, noise schedule and first stage."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.runs.run import Run
from jobs.training import latents
from jobs.training.config import ConvertConfig
from model.config import TrainConfig, to_dict
from model.network.unet import UNet
from model.weights import checkpoint, compvis, first_stage
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.embed import dataset_encoder
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output


class Convert(Stage):
    """The stage from a `model.ckpt` to runs/<run>: a checkpoint, and first_stage/ if the file has one."""

    name = "convert"

    def __init__(self, run: Run, source: str, database: Dataset, config: ConvertConfig) -> None:
        super().__init__(run.root, run.path, config)
        self.run, self.source, self.database = run, Path(source), database
        if not self.source.is_file():
            raise ValueError(f"there is no checkpoint {source}\nhint: --checkpoint model.ckpt")

    @property
    def command(self) -> str:
        return (f"python -m jobs convert {self.run.name} --checkpoint {storage.quote(str(self.source))} "
                f"--database {self.database.label} --root {storage.quote(self.root)}")

    @property
    def alternative(self) -> str:
        return "give the run another name"

    def section(self) -> dict[str, Any]:
        released, config, autoencoder = self._content
        about = None
        if autoencoder:
            about = latents.describe_first_stage(autoencoder, latents.IN_THE_RUN, autoencoder.scale)
        size = 256 if not about or about["factor"] < 16 else 768
        return super().section() | {
            "train": json.loads(json.dumps(to_dict(config))), "database": self.database.label,
            "encoder": dataset_encoder(self.database), "image_size": size, "first_stage": about,
            "checkpoint": self._sha256, "averaged": released.averaged}

    def plan(self) -> list[Item]:
        released, config, _ = self._content
        dim = dataset_encoder(self.database)["dim"]
        if config.unet.context_dim != dim:
            raise ValueError(f"the checkpoint takes vectors of {config.unet.context_dim}, {self.database.label} has "
                             f"vectors of {dim}\nhint: --database that was embedded by the encoder it was trained with")
        return [Item("checkpoint", {"step": released.step})]

    def process(self, item: Item, scratch: Path) -> Output:
        released, config, autoencoder = self._content
        network = UNet(config.unet)
        try:
            network.load_state_dict({name: tensor.float() for name, tensor in released.unet.items()})
        except RuntimeError as error:
            raise ValueError(f"{self.source}: the UNet is not one of the release: "
                             f"{str(error).splitlines()[1].strip()}") from error
        kept = scratch / "checkpoint"
        checkpoint.write_converted(kept, network, config, released.step)
        self.run.publish(released.step, kept)
        files = {}
        if autoencoder:
            latents.save_first_stage(autoencoder, scratch / "first_stage")
            files = {f"first_stage/{path.name}": path for path in sorted((scratch / "first_stage").iterdir())}
        return Output(samples=sum(weight.numel() for weight in network.parameters()), files=files,
                      info={"step": released.step, "averaged": released.averaged, "left_out": len(released.left_out),
                            "checkpoint": self.run.checkpoint(released.step)["content"]})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info=records[0]["info"])

    @cached_property
    def _sha256(self) -> str:
        return storage.sha256_file(self.source)

    @cached_property
    def _content(self) -> tuple[compvis.Released, TrainConfig, first_stage.FirstStage | None]:
        """The content of the file, cached because it may be many gigabytes."""
        released = compvis.read(self.source)
        unet = compvis.unet_config(released.unet, self.config.head_dim)
        config = TrainConfig(steps=max(1, released.step), global_batch=1, unet=unet, diffusion=released.diffusion,
                             k=self.config.k, context_norm=self.config.context_norm)
        if not released.first_stage:
            return released, config, None
        weights = {name: tensor.float() for name, tensor in released.first_stage.items()}
        autoencoder = first_stage.build(compvis.first_stage_config(weights), compvis.first_stage_weights(weights))
        return released, config, replace(autoencoder, scale=self.config.scale or released.scale or 1.0)
