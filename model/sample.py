"""Sampling: deterministic DDIM with classifier-free guidance.

Letters: B pictures, C channels, k context vectors, D their dimension, s guidance;
x_t, x0, eps, alpha, sigma as in `model.diffusion`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from model import randomness
from model.config import DiffusionConfig
from model.diffusion import alpha_bar, to_x0_eps

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


def initial_noise(seed: int, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Starting noise (B, *shape) on the CPU, the same for a position whatever else is sampled."""
    return randomness.noise(seed, "sample", 0, positions, shape)


def ddim_timesteps(count: int, steps: int) -> list[int]:
    """The noise levels visited, high to low, evenly spaced from 1 as the release spaces them.

    Raises ValueError unless 1 <= steps < count.
    """
    if not 1 <= steps < count:
        raise ValueError(f"steps = {steps}: must be at least 1 and below timesteps = {count}")
    return [i * count // steps + 1 for i in reversed(range(steps))]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    diffusion: DiffusionConfig,
    context: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    clamp: bool = True,
) -> Tensor:
    """Draw pictures with DDIM, eta 0 (Song et al. 2021, arXiv:2010.02502, equation 12).

    context (B, k, D), noise (B, C, H, W) -> pictures (B, C, H, W), in [-1, 1] with `clamp`.
    Guidance is eps_u + s (eps_c - eps_u) against a context of zeros (Ho and Salimans 2022,
    arXiv:2207.12598); s = 1 spares the second evaluation. Leave `clamp` off for latents.
    """
    if len(context) != len(noise):
        raise ValueError(f"{len(context)} contexts for {len(noise)} pictures of noise")
    device, x = context.device, noise.to(context.device)  # (B, C, H, W)
    levels = ddim_timesteps(diffusion.timesteps, steps)
    bar = alpha_bar(diffusion)
    for level, lower in zip(levels, [*levels[1:], 0], strict=True):
        t = torch.full((len(x),), level, device=device)  # (B,)
        answer = _guided(denoiser, x, t, context, guidance)
        x0, eps = to_x0_eps(diffusion, x, answer, t)
        if clamp:
            x0 = x0.clamp(-1.0, 1.0)
            # The noise must again explain x_t, or the clamped part would come back as noise.
            here = bar[level].item()
            eps = (x - here**0.5 * x0) / (1.0 - here) ** 0.5
        after = bar[lower].item()
        x = after**0.5 * x0 + (1.0 - after) ** 0.5 * eps
    return x.clamp(-1.0, 1.0) if clamp else x


def _guided(denoiser: Denoiser, x: Tensor, t: Tensor, context: Tensor, guidance: float) -> Tensor:
    """The guided answer (B, C, H, W); one rule for all predictions, affine in eps at a fixed x_t."""
    if guidance == 1.0:
        return denoiser(x, t, context).float()
    both = denoiser(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(context), context])
    )  # (2B, C, H, W)
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)
