"""Hashes of decoded images: exact and perceptual."""

import hashlib

import numpy as np
from PIL import Image

from pipeline.media.resize import to_pillow
from pipeline.media.types import Pixels, size_of


def pixel_hash(image: Pixels) -> str:
    """sha256 of size and pixels as RGB: equal for equal images, however they were encoded."""
    digest = hashlib.sha256(b"%d %d\n" % size_of(image))
    digest.update((image if isinstance(image, np.ndarray) else to_pillow(image)).tobytes())
    return digest.hexdigest()


def perceptual_hash(image: Pixels) -> tuple[int, tuple[int, int, int]]:
    """PHash (64 bits, the same but for a few bits for a copy scaled or encoded again), and the mean color.

    pHash sees luminance alone, without its level: a red square and a blue one, a blank image and any other have the
    same. The mean color tells these apart.
    """
    import imagehash  # loads scipy

    rgb = to_pillow(image)
    bits = imagehash.phash(rgb).hash.flatten()
    mean = rgb.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), mean  # type: ignore[return-value]
