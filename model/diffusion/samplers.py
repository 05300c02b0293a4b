"""Samplers: DDIM, DPM-Solver++ and the flow ODE."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import DiffusionConfig
from model.diffusion import randomness
from model.diffusion.guidance import Guidance
from model.diffusion.process import amplitudes, to_x0_eps

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
Sampler = Literal["ddim", "dpm++", "euler", "heun"]
_FEW = 15  # steps below which DPM-Solver++ ends with one of first order, as its authors advise


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


def timesteps(diffusion: DiffusionConfig, sampler: Sampler, steps: int) -> list[int]:
    """The `steps` + 1 noise levels of a sampler, from high to low, ending at 0.

    ddim has the levels of the published code. A flow has evenly spaced levels. dpm++ has levels that are evenly spaced
    in log(alpha / sigma).
    """
    count = diffusion.timesteps
    if sampler == "ddim" and diffusion.prediction != "flow":
        return [*ddim_timesteps(count, steps), 0]
    if not 1 <= steps < count:
        raise ValueError(f"steps = {steps}: must be at least 1 and below timesteps = {count}")
    if sampler != "dpm++":
        return [round(i * (count - 1) / steps) for i in reversed(range(steps + 1))]
    alpha, sigma = amplitudes(diffusion)
    logs = (alpha / sigma).log()  # falls as the level rises
    levels = [count - 1]
    for i in range(1, steps + 1):
        wanted = logs[-1] + (logs[0] - logs[-1]) * i / steps
        nearest = int((logs - wanted).abs().argmin())
        levels.append(max(min(nearest, levels[-1] - 1), steps - i))
    return levels


def check_sampler(diffusion: DiffusionConfig, sampler: Sampler, steps: int, eta: float = 0.0) -> None:
    """Raise ValueError unless the sampler suits the network's noise process."""
    flow = diffusion.prediction == "flow"
    if sampler not in ("ddim", "dpm++", "euler", "heun"):
        raise ValueError(f"sampler = {sampler!r}: must be ddim, dpm++, euler or heun")
    if sampler in ("euler", "heun") and not flow:
        raise ValueError(f"{sampler} follows a flow, this network predicts {diffusion.prediction}\nhint: ddim or dpm++")
    if sampler == "dpm++" and flow:
        raise ValueError("dpm++ is for noise schedules, this network predicts a flow\nhint: heun or euler")
    if eta and (sampler != "ddim" or flow):
        raise ValueError("eta is for ddim with a noise schedule")
    timesteps(diffusion, sampler, steps)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    diffusion: DiffusionConfig,
    context: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float | Guidance,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    fresh: Callable[[int], Tensor] | None = None,
    clamp: bool = True,
) -> Tensor:
    """Generate images from noise.

    context (B, k, D), noise (B, C, H, W) -> images (B, C, H, W). `clamp` keeps them in [-1, 1]; latents need it off.

    * "ddim": Song et al. 2021, arXiv:2010.02502, equation 12. `eta` > 0 needs `fresh`, which returns the noise
      (B, C, H, W) of a step.
    * "dpm++": DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    * "euler" and "heun": for flows. "heun" calls the denoiser twice a step.

    Raises ValueError if sampler, network and arguments do not fit each other.
    """
    if len(context) != len(noise):
        raise ValueError(f"{len(context)} contexts for {len(noise)} images of noise")
    check_sampler(diffusion, sampler, steps, eta)
    if eta and fresh is None:
        raise ValueError("eta needs fresh noise")
    scales = guidance if isinstance(guidance, Guidance) else Guidance(guidance, guidance)
    path = _Path(denoiser, diffusion, context, scales, clamp)
    levels = timesteps(diffusion, sampler, steps)
    x = noise.to(context.device)  # (B, C, H, W)
    if sampler == "dpm++":
        x = _dpm(path, x, levels)
    elif sampler in ("euler", "heun"):
        x = _flow(path, x, levels, twice=sampler == "heun")
    else:
        for number, (level, lower) in enumerate(itertools.pairwise(levels)):
            x0, eps = path.at(x, level)
            (_, here), (alpha, sigma) = path.amplitudes(level), path.amplitudes(lower, last=number == steps - 1)
            if eta:
                assert fresh is not None
                before = path.amplitudes(level)[0]
                # Equation 16 of the paper: new noise replaces a part of the old noise.
                added = eta * sigma / here * math.sqrt(max(0.0, 1 - (before / alpha) ** 2))
                x = alpha * x0 + math.sqrt(max(0.0, sigma**2 - added**2)) * eps + added * fresh(number).to(x)
            else:
                x = alpha * x0 + sigma * eps
    return x.clamp(-1.0, 1.0) if clamp else x


@dataclass
class _Path:
    """The functions that the steps of all samplers share."""

    denoiser: Denoiser
    diffusion: DiffusionConfig
    context: Tensor
    guidance: Guidance
    clamp: bool

    def amplitudes(self, level: int, last: bool = False) -> tuple[float, float]:
        """Amplitudes of signal and noise. The `last` step of a flow has no noise."""
        if last and self.diffusion.prediction == "flow":
            return 1.0, 0.0
        alpha, sigma = amplitudes(self.diffusion)
        return alpha[level].item(), sigma[level].item()

    def at(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """x0 and eps of x (B, C, H, W) by the guided prediction: two of (B, C, H, W)."""
        t = torch.full((len(x),), level, device=x.device)  # (B,)
        x0, eps = to_x0_eps(self.diffusion, x, self._guided(x, t), t)
        if self.clamp:
            x0 = x0.clamp(-1.0, 1.0)
            # The noise must again explain x_t. Otherwise the clamped part would return as noise.
            alpha, sigma = self.amplitudes(level)
            eps = (x - alpha * x0) / sigma
        return x0, eps

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided answer (B, C, H, W); one rule for all predictions, affine in eps at a fixed x_t."""
        text, neighbors = self.guidance.text, self.guidance.neighbors
        if text == neighbors == 1.0:
            return self.denoiser(x, t, self.context).float()
        null = torch.zeros_like(self.context)
        contexts = [null, self.context]
        if text != neighbors:
            # Repeating the vector gives one shape for all, and does not change a set.
            contexts.insert(1, self.context[:, :1].expand_as(self.context))
        times = len(contexts)
        answers = self.denoiser(x.repeat(times, 1, 1, 1), t.repeat(times), torch.cat(contexts)).float().chunk(times)
        if times == 2:
            return answers[0] + text * (answers[1] - answers[0])
        return answers[0] + text * (answers[1] - answers[0]) + neighbors * (answers[2] - answers[1])


def _dpm(path: _Path, x: Tensor, levels: list[int]) -> Tensor:
    steps, before, last_h = len(levels) - 1, None, 0.0
    for number, (level, lower) in enumerate(itertools.pairwise(levels)):
        x0, _ = path.at(x, level)
        (alpha, sigma), (alpha_next, sigma_next) = path.amplitudes(level), path.amplitudes(lower)
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        towards = x0
        if before is not None and not (number == steps - 1 and steps < _FEW):
            ratio = last_h / h
            towards = (1 + 0.5 / ratio) * x0 - 0.5 / ratio * before
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * towards
        before, last_h = x0, h
    return x


def _flow(path: _Path, x: Tensor, levels: list[int], *, twice: bool) -> Tensor:
    steps = len(levels) - 1
    for number, (level, lower) in enumerate(itertools.pairwise(levels)):
        x0, eps = path.at(x, level)
        velocity = eps - x0
        step = path.amplitudes(lower, last=number == steps - 1)[1] - path.amplitudes(level)[1]
        if twice and number < steps - 1:
            x0, eps = path.at(x + step * velocity, lower)
            velocity = (velocity + eps - x0) / 2
        x = x + step * velocity
    return x
