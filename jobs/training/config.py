"""Settings of the latents and convert stages."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class LatentsConfig:
    """Settings of the latents."""

    first_stage: str = ""
    """Folder of an autoencoder in the format of diffusers (`convert` writes it), or its name in the hub."""
    flips: bool = False
    """Keep the latents of the mirrored image too. Training chooses one of both."""
    scale: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Factor of the latents. 0: the factor in the configuration of the autoencoder, or else the inverse of the standard
    deviation of the first batch."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Images that are encoded together."""

    def __post_init__(self) -> None:
        check_bounds("latents", self)


@dataclass(frozen=True)
class ConvertConfig:
    """Settings that a published checkpoint does not contain."""

    head_dim: Annotated[int, Ge(1)] = 32
    """Channels of an attention head; 32 in all three released models."""
    scale: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Factor of the latents. 0: the factor in the checkpoint, or 1."""
    context_norm: Annotated[float, Interval(gt=0, lt=inf)] = 1.0
    """Length of the context vectors in training. The 256 pixel models used CLIP vectors without normalization: about
    10 for images of ViT-B/32."""
    k: Annotated[int, Ge(1)] = 4
    """Number of neighbors of each image in the training of the checkpoint."""

    def __post_init__(self) -> None:
        check_bounds("convert", self)
