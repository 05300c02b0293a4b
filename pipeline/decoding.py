"""Encoded pictures -> what an encoder takes; here, or wherever somebody lends cores. Needs no torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline import clip
from pipeline.media.types import BadPicture


@dataclass
class Decoded:
    """Some pictures as an encoder takes them; those that are none left out."""

    there: list[int]
    """Positions of those that are pictures."""
    pictures: np.ndarray | None
    """Of these, (n, S, S, 3) uint8, or (n, 3, H, W) float32 as open_clip prepares them; None if there are none."""
    seconds: float
    """What it took, where it was done."""


class Elsewhere(Protocol):
    """Decoders on other nodes; `at_once` portions keep them busy."""

    at_once: int

    def __call__(self, data: list[bytes], preprocessing: dict[str, Any]) -> Decoded | None:
        """As `decoded` gives it; None if none of them can: whoever asked does it then."""


def decoded(data: list[bytes], prepare: Callable[[bytes], np.ndarray]) -> Decoded:
    """What `prepare` makes of each picture, one after another."""
    begun, there, pictures = time.perf_counter(), [], []
    for position, one in enumerate(data):
        try:
            pictures.append(prepare(one))
        except BadPicture:
            continue
        there.append(position)
    return Decoded(there, np.stack(pictures) if pictures else None, time.perf_counter() - begun)


def by_description(data: list[bytes], preprocessing: dict[str, Any]) -> Decoded:
    """`decoded` for an encoder that is somewhere else, by the preprocessing in its description."""
    theirs = clip.preparation(preprocessing)
    return decoded(data, lambda one: clip.prepared(one, preprocessing, theirs))
