"""The interface of decoders on other nodes."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass
class DecodedBatch:
    """Decoded images as an encoder takes them, without those that did not decode."""

    there: list[int]
    """Positions of the files that decoded."""
    pictures: np.ndarray | None
    """(n, S, S, 3) uint8, or (n, 3, H, W) float32 as open_clip prepares them; None if n is 0."""
    seconds: float
    """Seconds that the decoder took."""


class DecoderPool(Protocol):
    """Decoders on other nodes; `at_once` portions keep them busy."""

    at_once: int

    def __call__(self, data: list[bytes], preprocessing: dict[str, Any]) -> DecodedBatch | None:
        """Decode image files. None if no decoder answers: the caller decodes them itself."""
