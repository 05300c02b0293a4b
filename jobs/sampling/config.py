"""Settings of sampling."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    k: int = 4
    """Neighbours of the text that join its vector in the context."""
    text: bool = True
    """Put the text's own vector before its neighbours; without, it only finds them."""
    guidance: float = 2.0
    """Guidance scale s: eps_u + s (eps_c - eps_u); 1 is none."""
    seed: int = 0
    """Seed of the noise; a prompt starts from the same noise in every database."""
    steps: int = 50
    """Steps of the sampler."""
    sampler: Literal["ddim", "dpm++", "euler", "heun"] = "ddim"
    """ddim; dpm++ (DPM-Solver++, 2M), for which 20 steps are enough; euler or heun for runs that predict a flow."""
    eta: float = 0.0
    """Noise that ddim draws anew in each step: 0 none, 1 as much as the diffusion it was trained with."""
    text_guidance: float = -1.0
    """Guidance scale of the prompt's own vector, `guidance` then being that of the neighbours; -1: the same."""
    batch_size: int = 16
    """Pictures drawn at a time."""
    ema: float = 0.0
    """Rate of the average that is drawn from, of those that the run kept; 0: its first one."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """What the network computes in; auto: bf16 where the machine is faster in it, which moves some pixels."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"sample.precision = {self.precision!r}: must be fp32, bf16 or auto")
        for name, least in (("k", 0), ("batch_size", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sample.{name} = {getattr(self, name)}: must be at least {least}")
        if not self.text and (self.k < 1 or self.text_guidance >= 0):
            raise ValueError("sample.text = false: takes neighbours, and no guidance of the text's own")
        if self.sampler not in ("ddim", "dpm++", "euler", "heun"):
            raise ValueError(f"sample.sampler = {self.sampler!r}: must be ddim, dpm++, euler or heun")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta = {self.eta}: must be within 0 and 1")
        if not (self.text_guidance == -1 or self.text_guidance >= 0):
            raise ValueError(f"sample.text_guidance = {self.text_guidance}: must be at least 0, or -1 for the other's")
        if not math.isfinite(self.guidance):
            raise ValueError(f"sample.guidance = {self.guidance}: must be a number")


@dataclass(frozen=True)
class QueryConfig:
    """What is drawn beside prompts and pictures, and which of the nearest neighbours are taken."""

    unconditional: int = 0
    """Pictures of each database without a prompt, from rows drawn as often as each is a neighbour in training (p_D)."""
    top_m: float = 1.0
    """Draw them from this share of the database's rows, those with the highest p_D; one row at least."""
    pool: int = 0
    """Take the neighbours at random from so many nearest ones of each database; 0: take the nearest."""

    def __post_init__(self) -> None:
        for name in ("unconditional", "pool"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if not 0 < self.top_m <= 1:
            raise ValueError(f"top_m = {self.top_m}: must be above 0 and at most 1\nhint: --top-m 0.01")
