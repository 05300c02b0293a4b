"""How the name of a member of a tar is divided into the key of its sample and a suffix."""

import re

from pipeline.media.types import SUFFIXES

FIRST_IMAGE_SUFFIXES = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "tif", "tiff", "avif")
"""A sample that has several images has one of these first, because earlier versions knew no others."""
IMAGE_SUFFIXES = tuple(dict.fromkeys((*FIRST_IMAGE_SUFFIXES, *(suffix[1:] for suffix in SUFFIXES), "img")))
"""Endings of images: those that folders accept, and `img`, which names no format."""
CAPTION_SUFFIXES = ("txt", "caption", "text")

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset ignores these
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset divides names


def split_at_last_dot(key: str, suffix: str) -> tuple[str, str]:
    """Key and suffix of a name that webdataset divides at its first dot, divided at its last dot."""
    head, dot, last = suffix.rpartition(".")
    return (f"{key}.{head}", last) if dot else (key, suffix)
