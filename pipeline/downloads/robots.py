"""Directives of the X-Robots-Tag header."""

from collections.abc import Iterable

from pipeline.downloads.urls import TOKEN

_ROBOTS_WITH_VALUE = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}


def robots_directives(tags: Iterable[str], agent: str) -> set[str]:
    """The directives of X-Robots-Tag headers that apply to everybody or to `agent`.

    A name before a colon addresses the rest of its header, up to the next name.
    """
    directives = set()
    for tag in tags:
        ours = True
        for part in tag.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _ROBOTS_WITH_VALUE and TOKEN.fullmatch(name):
                ours, name = name in {"*", agent}, rest
            if ours:
                directives.add(name)
    return directives
