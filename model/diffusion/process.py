"""The forward processes and the targets of the denoiser.

Letters: B batch, t step in 0..T-1, x0 the image in [-1, 1] (or a latent), eps the noise.

* x_t = alpha x0 + sigma eps with alpha^2 = alpha_bar and alpha^2 + sigma^2 = 1 (Ho et al. 2020, arXiv:2006.11239)
* v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv:2202.00512)
* flow: alpha = 1 - sigma, sigma rises evenly with t, the velocity is eps - x0 (Liu et al. 2022, arXiv:2209.03003)
"""

from functools import lru_cache

import torch
from torch import Tensor

from model.config import DiffusionConfig


@lru_cache(maxsize=16)
def alpha_bar(config: DiffusionConfig, device: torch.device | str = "cpu") -> Tensor:
    """Fraction of the signal's variance left at each step: (T,) float64."""
    root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    # Computed on the CPU and moved, so that every device uses the very same numbers.
    return torch.cumprod(1.0 - root**2, dim=0).to(device)


def alpha_sigma(config: DiffusionConfig, t: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and noise at t (B,) -> two of (B, 1, 1, 1) float32."""
    alpha, sigma = (amplitude[t][:, None, None, None].float() for amplitude in amplitudes(config, t.device))
    return alpha, sigma


@lru_cache(maxsize=16)
def amplitudes(config: DiffusionConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and noise at every step: two of (T,) float64."""
    if config.prediction == "flow":
        # In the middle of each step, so that neither amplitude is zero.
        sigma = (torch.arange(config.timesteps, dtype=torch.float64) + 0.5) / config.timesteps
        return (1.0 - sigma).to(device), sigma.to(device)
    bar = alpha_bar(config, device)
    return bar.sqrt(), (1.0 - bar).sqrt()


def q_sample(config: DiffusionConfig, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Noise x0 (B, C, H, W) with eps (B, C, H, W) up to step t (B,) -> x_t (B, C, H, W)."""
    alpha, sigma = alpha_sigma(config, t)
    return alpha * x0 + sigma * eps


def target(config: DiffusionConfig, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The target of the denoiser at step t: eps, v, x0 or the velocity (B, C, H, W)."""
    if config.prediction == "epsilon":
        return eps
    if config.prediction == "x0":
        return x0
    if config.prediction == "flow":
        return eps - x0
    alpha, sigma = alpha_sigma(config, t)
    return alpha * eps - sigma * x0


def to_x0_eps(config: DiffusionConfig, x_t: Tensor, answer: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and eps by the denoiser's prediction at (x_t, t): two of (B, C, H, W)."""
    alpha, sigma = alpha_sigma(config, t)
    if config.prediction == "epsilon":
        return (x_t - sigma * answer) / alpha, answer
    if config.prediction == "x0":
        return answer, (x_t - alpha * answer) / sigma
    if config.prediction == "flow":
        return x_t - sigma * answer, x_t + alpha * answer
    return alpha * x_t - sigma * answer, sigma * x_t + alpha * answer


def loss(config: DiffusionConfig, answer: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Squared error of the prediction, averaged over each image and weighted by its noise level: (B,) float32."""
    error = (answer.float() - target(config, x0, eps, t)).square().mean(dim=(1, 2, 3))
    return error * loss_weights(config, t) if config.min_snr else error


def loss_weights(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Weights of the error at t (B,) -> (B,) float32. They weigh an error of x0 by min(SNR, min_snr).

    Hang et al. 2023, arXiv:2303.09556, section 3.4, for x0, epsilon and v.
    """
    alpha, sigma = (amplitude.flatten() for amplitude in alpha_sigma(config, t))
    snr = (alpha / sigma).square()
    # The squared error of x0 for a unit of squared error of the prediction.
    moved = {"epsilon": 1 / snr, "x0": torch.ones_like(snr), "v": sigma.square(), "flow": sigma.square()}
    return snr.clamp(max=config.min_snr) * moved[config.prediction]
