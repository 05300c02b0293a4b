"""Paths and URLs: join and normalize."""

import hashlib
import os
import shlex
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


def normalize(url: str) -> str:
    """`url` made absolute when it is local, without a trailing slash."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url.rstrip("/")


def quote(url: str) -> str:
    """`url` as a word of a shell command, for hints."""
    return shlex.quote(url)


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
