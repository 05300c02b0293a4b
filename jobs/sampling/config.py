"""Settings of sampling."""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    k: Annotated[int, Ge(0)] = 4
    """Neighbours of the text that join its vector in the context."""
    text: bool = True
    """Put the text's own vector before its neighbours; without, it only finds them."""
    guidance: Annotated[float, Interval(gt=-inf, lt=inf)] = 2.0
    """Guidance scale s: eps_u + s (eps_c - eps_u); 1 is none."""
    seed: int = 0
    """Seed of the noise; a prompt starts from the same noise in every database."""
    steps: Annotated[int, Ge(1)] = 50
    """Steps of the sampler."""
    sampler: Literal["ddim", "dpm++", "euler", "heun"] = "ddim"
    """ddim; dpm++ (DPM-Solver++, 2M), for which 20 steps are enough; euler or heun for runs that predict a flow."""
    eta: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Noise that ddim draws anew in each step: 0 none, 1 as much as the diffusion it was trained with."""
    text_guidance: Annotated[float, Interval(ge=-1, lt=inf)] = -1.0
    """Guidance scale of the prompt's own vector, `guidance` then being that of the neighbours; -1: the same."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Pictures drawn at a time."""
    ema: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Rate of the average that is drawn from, of those that the run kept; 0: its first one."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """What the network computes in; auto: bf16 where the machine is faster in it, which moves some pixels."""

    def __post_init__(self) -> None:
        check_bounds("sample", self)
        if -1 < self.text_guidance < 0:
            raise ValueError(f"sample.text_guidance = {self.text_guidance}: must be at least 0, or -1 to use "
                             f"sample.guidance = {self.guidance}")
        if not self.text and self.k < 1:
            raise ValueError("sample.k = 0: must be at least 1 with sample.text = False\nhint: --text")
        if not self.text and self.text_guidance >= 0:
            raise ValueError(f"sample.text_guidance = {self.text_guidance}: must be -1 with sample.text = False\n"
                             f"hint: --text")


@dataclass(frozen=True)
class QueryConfig:
    """What is drawn beside prompts and pictures, and which of the nearest neighbours are taken."""

    unconditional: Annotated[int, Ge(0)] = 0
    """Pictures of each database without a prompt, from rows drawn as often as each is a neighbour in training (p_D)."""
    top_m: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Draw them from this share of the database's rows, those with the highest p_D; one row at least."""
    pool: Annotated[int, Ge(0)] = 0
    """Take the neighbours at random from so many nearest ones of each database; 0: take the nearest."""
    count: Annotated[int, Ge(1)] = 1
    """Images of each prompt and query image, each from other noise."""

    def __post_init__(self) -> None:
        check_bounds("sample", self)
