"""Settings of sampling."""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class SampleConfig:
    """How a trained model generates images."""

    k: Annotated[int, Ge(0)] = 4
    """Number of neighbors in the context."""
    text: bool = True
    """Put the vector of the text into the context, before its neighbors. Otherwise the text only finds neighbors."""
    guidance: Annotated[float, Interval(gt=-inf, lt=inf)] = 2.0
    """Guidance scale s: eps_u + s (eps_c - eps_u); 1 means no guidance."""
    seed: int = 0
    """Seed of the noise. A prompt starts from the same noise in every database."""
    steps: Annotated[int, Ge(1)] = 50
    """Steps of the sampler."""
    sampler: Literal["ddim", "dpm++", "euler", "heun"] = "ddim"
    """ddim; dpm++ (DPM-Solver++, 2M), for which 20 steps are enough; euler or heun for runs that predict a flow."""
    eta: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Noise that ddim adds in each step: 0 none, 1 as much as the diffusion process of training."""
    text_guidance: Annotated[float, Interval(ge=-1, lt=inf)] = -1.0
    """Separate guidance scale for the vector of the prompt. `guidance` is then only for the neighbors. -1: one
    scale."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Images generated at the same time."""
    ema: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Sample with the averaged weights (EMA) of this rate. 0: those of ema_decay."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Precision of the network. auto: bf16 if it is faster on the machine. This changes some pixels."""

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
    """How many images to generate, also without a prompt, and which neighbors to use."""

    unconditional: Annotated[int, Ge(0)] = 0
    """Images of each database without a prompt, from rows sampled by p_D: how often each is a neighbor in training."""
    top_m: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample these rows from the fraction of the database with the highest p_D; at least one row."""
    pool: Annotated[int, Ge(0)] = 0
    """Choose the neighbors at random from this many nearest ones of each database; 0: use the nearest."""
    count: Annotated[int, Ge(1)] = 1
    """Images of each prompt and query image, each from different noise."""

    def __post_init__(self) -> None:
        check_bounds("sample", self)
