"""The inputs of each training step: images, noise, noise levels and context vectors."""

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import TrainConfig
from model.diffusion import randomness

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """The share of this process in one step: x0, eps (B, C, H, W), t (B,), context (B, k, D)."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor

    def to(self, device: torch.device) -> "Inputs":
        def move(x: Tensor) -> Tensor:
            if device.type == "cuda":
                return x.pin_memory().to(device, non_blocking=True)
            return x.to(device)

        return Inputs(move(self.x0), move(self.eps), move(self.t), move(self.context))


def prefetch_inputs(config: TrainConfig, batch_at: Callable[[int], Batch], rank: int, world: int, first: int
                    ) -> Generator[tuple[Inputs, float], None, None]:
    """The inputs of each step from `first`, and the seconds spent waiting for them; a thread prepares the next step."""
    positions = range(rank * config.global_batch // world, (rank + 1) * config.global_batch // world)
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = None
        for step in range(first, config.steps):
            future = future or pool.submit(_prepare_inputs, config, batch_at, step, positions)
            started = time.perf_counter()
            inputs, future = future.result(), None
            waited = time.perf_counter() - started
            if step + 1 < config.steps:
                future = pool.submit(_prepare_inputs, config, batch_at, step + 1, positions)
            yield inputs, waited


def _prepare_inputs(config: TrainConfig, batch_at: Callable[[int], Batch], step: int, positions: range) -> Inputs:
    """The inputs of one step, from its batch and the random numbers of its positions."""
    batch = batch_at(step)
    if "latent" in batch:
        x0 = torch.from_numpy(batch["latent"]).float()  # (B, C, h, w)
    else:
        image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)  # (B, 3, H, W)
        x0 = (image.float() / 127.5 - 1.0).contiguous()
    neighbors = torch.from_numpy(batch["neighbors"])  # (B, K, D)
    k = randomness.shared_integer(config.seed, "k", step, 1, config.k) if config.random_k else config.k
    wanted = (len(positions), config.k, config.unet.context_dim)
    shape = (len(x0), min(neighbors.shape[1], config.k), neighbors.shape[2])
    if wanted != shape or len(neighbors) != len(x0):
        raise ValueError(
            f"step {step}: batch of {len(x0)} images with neighbors {tuple(neighbors.shape)}, "
            f"but this process needs (B, at least k, D) = {wanted}"
        )
    context = _perturb_neighbors(config, neighbors[:, :k].float(), step, positions)  # (B, k, D)
    if config.own != "none":
        context = torch.cat([torch.from_numpy(batch["own"]).float()[:, None], context], dim=1)  # (B, 1 + k, D)
    context = config.context_norm * context
    # The unconditional condition is zeros, as in the release's guidance.
    without = randomness.dropout_mask(config.seed, step, positions, config.p_uncond)
    context = context.masked_fill(without[:, None, None], 0.0)
    eps = randomness.noise(config.seed, "noise", step, positions, x0.shape[1:])
    t = randomness.timesteps(config.seed, step, positions, config.diffusion.timesteps)
    return Inputs(x0, eps, t, context)


def _perturb_neighbors(config: TrainConfig, neighbors: Tensor, step: int, positions: range) -> Tensor:
    """Add noise to neighbors (B, k, D), keep their lengths, and set some of them to zeros."""
    if config.neighbor_noise:
        noise = randomness.noise(config.seed, "neighbor noise", step, positions, neighbors.shape[1:])
        length = neighbors.norm(dim=-1, keepdim=True)
        # Standard normal noise in D dimensions has the length sqrt(D).
        noisy = neighbors + config.neighbor_noise * length * noise / neighbors.shape[-1] ** 0.5
        neighbors = torch.nn.functional.normalize(noisy, dim=-1) * length
    if config.p_drop_neighbor:
        draws = randomness.uniform(config.seed, "neighbor dropout", step, positions, neighbors.shape[1:2])
        neighbors = neighbors.masked_fill((draws < config.p_drop_neighbor)[..., None], 0.0)
    return neighbors
