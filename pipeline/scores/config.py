"""Settings of `score`."""

from dataclasses import dataclass
from typing import Literal

from pipeline.bounds import check_bounds

Activation = Literal["", "none", "relu", "gelu", "silu", "tanh"]
OutputFunction = Literal["", "none", "sigmoid", "softmax"]


@dataclass(frozen=True)
class ScoreConfig:
    """How the layers of a head are joined, if its file does not say it."""

    activation: Activation = ""
    """Function between the layers of the head. Default: what the file's metadata say as `activation`."""
    output: OutputFunction = ""
    """Function after the last layer. Default: what the file's metadata say as `output`, otherwise none."""

    def __post_init__(self) -> None:
        check_bounds("score", self)
