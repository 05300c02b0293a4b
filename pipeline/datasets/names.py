"""Which texts may name a dataset or a version."""

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBERED = re.compile(r"v([1-9]\d*)")
MOST_LETTERS = 240
"""The most letters in a name. File systems allow 255 in a file name, and neighbor lists are in NAME@VERSION."""


def is_name(text: str) -> bool:
    """Whether a dataset or a version may have this name."""
    return len(text) <= MOST_LETTERS and _NAME.fullmatch(text) is not None


def version_number(version: str) -> int:
    """The number in a version's name: 3 of v3, 0 of others."""
    match = _NUMBERED.fullmatch(version)
    return int(match[1]) if match else 0
