"""Settings of the latents and convert stages."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class LatentsConfig:
    """Which first stage, and what is kept of a picture."""

    first_stage: str = ""
    """Folder of an autoencoder as diffusers keeps it (convert writes such), or its name in the hub."""
    flips: bool = False
    """Keep the latents of the mirrored picture too, for training to choose from."""
    scale: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Factor of the latents; 0: that of the autoencoder's configuration or, where it names none, the inverse of the
    standard deviation of the first batch."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Pictures encoded at a time."""

    def __post_init__(self) -> None:
        check_bounds("latents", self)


@dataclass(frozen=True)
class ConvertConfig:
    """What a released checkpoint does not say of itself."""

    head_dim: Annotated[int, Ge(1)] = 32
    """Numbers of an attention head; 32 in all three released models."""
    scale: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Factor of the latents; 0: that in the checkpoint, or 1."""
    context_norm: Annotated[float, Interval(gt=0, lt=inf)] = 1.0
    """Length of the vectors that the network was trained with; those of the 256 pixel models were as CLIP makes them,
    about 10 for pictures of ViT-B/32."""
    k: Annotated[int, Ge(1)] = 4
    """Neighbours that it was trained with."""

    def __post_init__(self) -> None:
        check_bounds("convert", self)
