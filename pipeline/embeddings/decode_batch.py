"""Decode images for an encoder, on this node or another one. Needs no torch."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.embeddings import clip
from pipeline.media.types import BadImage
from pipeline.stages.decoder_pool import DecodedBatch


def decode_images(data: list[bytes], prepare: Callable[[bytes], np.ndarray]) -> DecodedBatch:
    """Apply `prepare` to each image. Images that do not decode are left out."""
    begun, there, pictures = time.perf_counter(), [], []
    for position, encoded in enumerate(data):
        try:
            pictures.append(prepare(encoded))
        except BadImage:
            continue
        there.append(position)
    return DecodedBatch(there, np.stack(pictures) if pictures else None, time.perf_counter() - begun)


def decode_by_description(data: list[bytes], preprocessing: dict[str, Any]) -> DecodedBatch:
    """Decode for an encoder on another node, by the preprocessing in its description."""
    theirs = clip.open_clip_transform(preprocessing)
    return decode_images(data, lambda encoded: clip.prepare_image(encoded, preprocessing, theirs))
