"""The usual names of columns, and the search for them in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable

CAPTION_COLUMNS = ("caption", "TEXT", "text", "captions", "alt_text")
LATER_CAPTION_COLUMNS = ("txt", "prompt", "title")
"""Looked for after the others in any spelling."""
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_path", "path")


def find_columns(names: Iterable[str], usual: Iterable[str], later: Iterable[str] = ()) -> list[str]:
    """The columns that have a usual name, the most usual first.

    Names that are spelled as in `usual` come first. Then follow those of `usual` and of `later` in any case, with
    blanks around them, and with blanks or hyphens in place of underscores.
    """
    names, usual = list(names), list(usual)
    by_plain_name: dict[str, list[str]] = {}
    for name in names:
        by_plain_name.setdefault(_plain_name(name), []).append(name)
    exact = [name for name in usual if name in names]
    similar = [name for wanted in (*usual, *later) for name in by_plain_name.get(_plain_name(wanted), ())]
    return list(dict.fromkeys([*exact, *similar]))


def find_caption_columns(names: Iterable[str]) -> list[str]:
    """The columns that usually hold a caption, the most usual first."""
    return find_columns(names, CAPTION_COLUMNS, LATER_CAPTION_COLUMNS)


def is_more_than_caption(name: str) -> bool:
    """Whether a column stays among the others though it is the caption: credits name the title of a work."""
    return _plain_name(name) == "title"


def _plain_name(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()
