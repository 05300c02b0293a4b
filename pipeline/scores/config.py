"""Settings of `score`."""

from dataclasses import dataclass
from typing import Literal

from pipeline.bounds import check_bounds

Activation = Literal["", "none", "relu", "gelu", "silu", "tanh"]
OutputFunction = Literal["", "none", "sigmoid", "softmax"]


@dataclass(frozen=True)
class ScoreConfig:
    """Functions of a head whose file does not name them."""

    activation: Activation = ""
    """Function between the layers of the head. Default: `activation` in the metadata of the file."""
    output: OutputFunction = ""
    """Function after the last layer. Default: `output` in the metadata of the file, otherwise none."""

    def __post_init__(self) -> None:
        check_bounds("score", self)
