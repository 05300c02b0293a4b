"""A trained run opened for drawing: context vectors -> pictures."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from jobs.runs.run import Run
from jobs.sampling.config import SampleConfig
from jobs.training import latents
from model.config import from_dict
from model.diffusion import randomness
from model.diffusion.guidance import Guidance
from model.diffusion.samplers import Denoiser, initial_noise, sample
from model.diffusion.samplers import check_sampler as check
from model.training.precision import compute_dtype
from model.weights import checkpoint
from model.weights.first_stage import FirstStage
from pipeline.datasets import hidden_rows
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.embeddings.embed import dataset_encoder
from pipeline.hardware import devices


class Drawer:
    """The averaged network of a checkpoint and what its latents are decoded with, on the GPU if there is one."""

    def __init__(self, run: Run, step: int, rate: float = 0.0) -> None:
        """`rate` is that of the average; 0: the run's first one."""
        self.run = run
        self.device = devices.choose_device()
        denoiser, self.config = checkpoint.load_denoiser(run.fetch(step), rate=rate)
        with devices.explain_failures(f"the network of the run {run.name} does not get onto the device"):
            self.denoiser = denoiser.to(self.device)
        self.about = {"step": step, "content": run.checkpoint(step)["content"]}
        self.size = int(run.section()["image_size"])
        self.first_stage = latents.first_stage_of_run(run)

    def draw(self, context: np.ndarray, positions: Sequence[int], how: SampleConfig) -> np.ndarray:
        """Pictures (N, S, S, 3) uint8 for unit vectors (N, k, D); `positions` (N,) choose the noise with the seed.

        A picture depends on its context, its position and `how` alone, whatever is drawn beside it.
        """
        if len(positions) != len(context):
            raise ValueError(f"{len(positions)} positions for {len(context)} contexts")
        vectors = self.config.context_norm * torch.from_numpy(np.asarray(context, np.float32))
        guidance = Guidance(how.guidance if how.text_guidance < 0 else how.text_guidance, how.guidance)
        side = self.size // (self.first_stage.factor if self.first_stage else 1)
        shape = (self.config.unet.in_channels, side, side)
        pictures = [np.empty((0, self.size, self.size, 3), np.uint8)]
        for start in range(0, len(vectors), how.batch_size):
            here = list(positions[start:start + how.batch_size])
            drawn = sample(self._asked(how.precision), self.config.diffusion,
                           vectors[start:start + len(here)].to(self.device),
                           initial_noise(how.seed, here, shape).to(self.device), steps=how.steps, guidance=guidance,
                           sampler=how.sampler, eta=how.eta,
                           fresh=lambda step, here=here: randomness.noise(how.seed, "eta", step, here, shape),
                           clamp=self.first_stage is None)
            if self.first_stage:
                drawn = torch.cat([self.first_stage.decode(one[None]) for one in drawn])
            values = ((drawn.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            pictures.append(values.permute(0, 2, 3, 1).numpy())
        return np.concatenate(pictures)

    def _asked(self, precision: str) -> Denoiser:
        """The network, computing in that precision; levels and steps stay in float32."""
        if compute_dtype(precision, self.device) == torch.float32:
            return self.denoiser

        def asked(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return self.denoiser(x, t, context)

        return asked


def open_generator(run: Run, step: int, rate: float = 0.0) -> Drawer:
    """The drawer of a checkpoint and one of its averages; the last one is kept in this process."""
    # A first stage that lies elsewhere may be another one by now.
    return _opened(run, step, rate, run.checkpoint(step)["content"], latents.first_stage_of_run(run),
                   devices.choose_device())


@lru_cache(maxsize=1)
def _opened(run: Run, step: int, rate: float, content: str, first_stage: FirstStage | None,
            device: torch.device) -> Drawer:
    return Drawer(run, step, rate)


def check_fit(run: Run, step: int, how: SampleConfig) -> None:
    """ValueError unless a checkpoint can be drawn from like that."""
    run.checkpoint(step)
    config = from_dict(run.config(step))
    checkpoint.check_average(config, how.ema)
    check(config.diffusion, how.sampler, how.steps, how.eta)


def same_encoder(run: Run, encoder: ClipConfig, databases: Sequence[Dataset]) -> None:
    """ValueError unless a run and the embeddings of databases belong to this encoder, naming what differs."""
    wanted = describe_encoder(encoder)
    for name, found in [(f"the run {run.name}", run.encoder()),
                        *((one.label, dataset_encoder(one)) for one in databases)]:
        differing = [key for key in wanted if wanted[key] != found.get(key)]
        if differing:
            raise ValueError(f"{name} belongs to another encoder than {encoder.model} ({encoder.pretrained}): "
                             f"they differ in {', '.join(differing)}\n"
                             f"hint: --model and --pretrained as when it was embedded")


def searched_database(database: Dataset) -> dict[str, dict[str, Any]]:
    """The stages of a database that a search depends on, as inputs of another stage."""
    found = {name: database.identity(name) for name in ("index", "embeddings", "shards")}
    found |= hidden_rows.hidden_row_inputs(database)
    return {f"{name} of {database.label}": one for name, one in found.items()}
