"""Paths and URLs: join and normalize."""

import hashlib
import os
from pathlib import Path

S3_SCHEMES, ATTEMPTS = {"s3", "s3a"}, 6


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local `url`."""
    assert is_local(url), url
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """`url` extended by `parts`, with single slashes between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def manifest_file_url(folder: str, name: str) -> str:
    """Where a manifest's file is: below `folder`, or at the whole address that an adopted file has for a name.

    A name with `../` before it is that of a file beside the folder: another version's, which is not copied.
    """
    if "://" in name or name.startswith("/"):
        return name
    base = folder.rstrip("/")
    while name.startswith("../"):
        base, name = base.rpartition("/")[0], name.removeprefix("../")
    return join(base, name)


def normalize(url: str) -> str:
    """`url` made absolute when it is local, without a trailing slash."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url.rstrip("/")


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
