"""Names of members of tars and of files: key, suffix, and folders that hold no samples."""

import re

from pipeline.media.types import SUFFIXES

FIRST_IMAGE_SUFFIXES = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "tif", "tiff", "avif")
"""A sample that has several images has one of these first, because earlier versions knew no others."""
IMAGE_SUFFIXES = tuple(dict.fromkeys((*FIRST_IMAGE_SUFFIXES, *(suffix[1:] for suffix in SUFFIXES), "img")))
"""Endings of images: those that folders accept, and `img`, which names no format."""
CAPTION_SUFFIXES = ("txt", "caption", "text")

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset ignores these
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset divides names

SYSTEM_FOLDERS = {"__macosx", "@eadir", "thumbs", "#recycle", "@recycle", "$recycle.bin", "system volume information",
                  "lost+found"}
"""Folders of file servers and desktops, which hold thumbnails and deleted files. Hidden folders are never listed."""


def split_at_last_dot(key: str, suffix: str) -> tuple[str, str]:
    """Key and suffix of a name that webdataset divides at its first dot, divided at its last dot."""
    head, dot, last = suffix.rpartition(".")
    return (f"{key}.{head}", last) if dot else (key, suffix)


def system_folder(name: str) -> str:
    """The first folder in a relative name that an operating system or a file server made, "" without one."""
    return next((part for part in name.split("/")[:-1] if part.lower() in SYSTEM_FOLDERS), "")
