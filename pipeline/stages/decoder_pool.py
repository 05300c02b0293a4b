"""The interface of decoders on other nodes."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass
class DecodedBatch:
    """Some pictures as an encoder takes them; those that are none left out."""

    there: list[int]
    """Positions of those that are pictures."""
    pictures: np.ndarray | None
    """Of these, (n, S, S, 3) uint8, or (n, 3, H, W) float32 as open_clip prepares them; None if there are none."""
    seconds: float
    """What it took, where it was done."""


class DecoderPool(Protocol):
    """Decoders on other nodes; `at_once` portions keep them busy."""

    at_once: int

    def __call__(self, data: list[bytes], preprocessing: dict[str, Any]) -> DecodedBatch | None:
        """As `decoded` gives it; None if none of them can: whoever asked does it then."""
