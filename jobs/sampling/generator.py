"""A trained run opened for sampling: context vectors -> images."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from jobs.runs.run import Run
from jobs.sampling.config import SampleConfig
from jobs.training import latents
from model.config import from_dict
from model.diffusion import randomness
from model.diffusion.guidance import Guidance
from model.diffusion.samplers import Denoiser, check_sampler, initial_noise, sample
from model.training.precision import compute_dtype
from model.weights import checkpoint
from model.weights.first_stage import FirstStage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.clip_weights import ClipConfig, check_encoder
from pipeline.embeddings.embed import dataset_encoder
from pipeline.hardware import devices
from pipeline.takedowns import hidden_rows


class ImageGenerator:
    """The averaged network of a checkpoint and the decoder of its latents, on the GPU if there is one."""

    def __init__(self, run: Run, step: int, rate: float = 0.0) -> None:
        """`rate`: the rate of the average (EMA); 0: the first one of the run."""
        self.run = run
        self.device = devices.choose_device()
        denoiser, self.config = checkpoint.load_denoiser(run.fetch(step), rate=rate)
        with devices.explain_failures(f"the network of the run {run.name} does not get onto the device"):
            self.denoiser = denoiser.to(self.device)
        self.about = {"step": step, "content": run.checkpoint(step)["content"]}
        self.size = run.image_size
        self.first_stage = latents.first_stage_of_run(run)

    def generate(self, context: np.ndarray, positions: Sequence[int], how: SampleConfig) -> np.ndarray:
        """Images (N, S, S, 3) uint8 for unit vectors (N, k, D). Seed and `positions` (N,) choose the noise.

        An image depends only on its context, its position and `how`, not on the rest of the batch.
        """
        if len(positions) != len(context):
            raise ValueError(f"{len(positions)} positions for {len(context)} contexts")
        vectors = self.config.context_norm * torch.from_numpy(np.asarray(context, np.float32))
        guidance = Guidance(how.guidance if how.text_guidance < 0 else how.text_guidance, how.guidance)
        side = self.size // (self.first_stage.factor if self.first_stage else 1)
        shape = (self.config.unet.in_channels, side, side)
        pictures = [np.empty((0, self.size, self.size, 3), np.uint8)]

        def fresh_noise(part: list[int], step: int) -> torch.Tensor:
            return randomness.noise(how.seed, "eta", step, part, shape)

        for start in range(0, len(vectors), how.batch_size):
            chunk = list(positions[start:start + how.batch_size])
            samples = sample(self._denoiser_in(how.precision), self.config.diffusion,
                           vectors[start:start + len(chunk)].to(self.device),
                           initial_noise(how.seed, chunk, shape).to(self.device), steps=how.steps, guidance=guidance,
                           sampler=how.sampler, eta=how.eta,
                           fresh=partial(fresh_noise, chunk), clamp=self.first_stage is None)
            if self.first_stage:
                samples = torch.cat([self.first_stage.decode(latent[None]) for latent in samples])
            values = ((samples.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            pictures.append(values.permute(0, 2, 3, 1).numpy())
        return np.concatenate(pictures)

    def _denoiser_in(self, precision: str) -> Denoiser:
        """The network in this precision; noise levels and steps stay in float32."""
        if compute_dtype(precision, self.device) == torch.float32:
            return self.denoiser

        def denoise(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return self.denoiser(x, t, context)

        return denoise


def open_generator(run: Run, step: int, rate: float = 0.0) -> ImageGenerator:
    """The generator of a checkpoint and one of its averages. The process caches the last one."""
    # The files of a first stage outside of the run may have changed.
    return _load_generator(run, step, rate, run.checkpoint(step)["content"], latents.first_stage_of_run(run),
                           devices.choose_device())


@lru_cache(maxsize=1)
def _load_generator(run: Run, step: int, rate: float, content: str, first_stage: FirstStage | None,
                    device: torch.device) -> ImageGenerator:
    return ImageGenerator(run, step, rate)


def check_sample_config(run: Run, step: int, how: SampleConfig) -> None:
    """ValueError unless a checkpoint can be sampled with this configuration."""
    run.checkpoint(step)
    run.refuse_replaced(step)
    config = from_dict(run.config(step))
    checkpoint.check_average(config, how.ema)
    check_sampler(config.diffusion, how.sampler, how.steps, how.eta)


def check_same_encoder(run: Run, encoder: ClipConfig, databases: Sequence[Dataset]) -> None:
    """ValueError unless a run and the embeddings of databases belong to this encoder, naming what differs."""
    check_encoder(encoder, f"the run {run.name}", run.encoder())
    for database in databases:
        check_encoder(encoder, database.label, dataset_encoder(database))


def search_inputs(database: Dataset) -> dict[str, dict[str, Any]]:
    """The stages of a database that a search depends on, as inputs of another stage."""
    inputs = {name: database.identity(name) for name in ("index", "embeddings", "shards")}
    inputs |= hidden_rows.hidden_row_inputs(database)
    return {f"{name} of {database.label}": identity for name, identity in inputs.items()}
