"""The known corpora: how each is recognized, and what is taken from it.

docs/guides/ingest/corpora.md has the table for users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A corpus as its makers publish it. Fields that are empty leave the choice to the usual names.

    `url`, `caption` and the values of `columns` are expressions of column_paths.py.
    """

    name: str
    has: tuple[str, ...]
    """Columns that it always has, in any case."""
    lacks: tuple[str, ...] = ()
    """Columns that tell it from another layout."""
    url: str = ""
    url_first: bool = False
    """Whether `url` counts before a column with a usual name, which holds no URLs here."""
    caption: str = ""
    hash: str = ""
    """Column with the hash of what `url` gives. It is not used if a setting names another URL."""
    columns: tuple[tuple[str, str], ...] = ()
    """Columns that are stored in addition, for credits: (name, expression)."""
    no_url: str = ""
    """Why it has no images, and what to do: the message and the hint."""


_SMITHSONIAN = "content.descriptiveNonRepeating"
_SMITHSONIAN_IMAGE = f"{_SMITHSONIAN}.online_media.media.0"
TABLES = (
    Layout("LAION after img2dataset", has=("url", "caption", "punsafe", "status", "error_message", "original_width")),
    Layout("re-LAION", has=("url", "similarity", "punsafe")),
    Layout("DataComp", has=("uid", "url", "text", "clip_b32_similarity_score")),
    Layout("PD12M", has=("id", "url", "caption", "mime_type", "hash", "license", "source")),
    Layout("OpenImages", has=("ImageID", "OriginalURL", "OriginalLandingURL"), url="OriginalURL", caption="Title",
           hash="OriginalMD5"),
    Layout("WikiArt", has=("image", "artist", "genre", "style"), caption="{style}, {genre}, {artist}"),
    Layout("ArtBench-10", has=("name", "artist", "url", "is_public_domain", "label", "split"),
           caption="{label}, {artist}"),
    Layout("Met", has=("primaryImage", "primaryImageSmall"), url="primaryImageSmall;primaryImage"),
    Layout("MetObjects.csv", has=("Object Number", "Is Public Domain", "Object ID", "Link Resource"),
           no_url="it has no URLs of images\nhint: --source FILE with the objects of the Met's API as JSON lines, or a "
                  "copy with the column primaryImageSmall"),
    Layout("Rijksmuseum", has=("objectInventoryNumber", "objectPersistentIdentifier", "objectImage"),
           url="objectImage", caption="objectTitle[1]", columns=(("title", "objectTitle[1]"),)),
    # The license of a record's metadata (metadata_usage) is not that of its images.
    Layout("Smithsonian", has=("unitCode", "content", "docSignature"), url=f"{_SMITHSONIAN_IMAGE}.content",
           url_first=True, caption=f"{_SMITHSONIAN}.title.content",
           columns=(("license", f"{_SMITHSONIAN_IMAGE}.usage.access"), ("author", "content.freetext.name.content"),
                    ("title", f"{_SMITHSONIAN}.title.content"),
                    ("page_url", f"{_SMITHSONIAN}.record_link;{_SMITHSONIAN}.guid"))),
    Layout("AIC", has=("image_id", "is_public_domain", "artist_title"),
           url="https://www.artic.edu/iiif/2/{image_id}/full/843,/0/default.jpg",
           columns=(("page_url", "https://www.artic.edu/artworks/{id}"),)),
)


def find_layout(names: Iterable[str]) -> Layout | None:
    """The first known layout whose columns a table has."""
    there = {name.strip().casefold() for name in names}
    return next((layout for layout in TABLES if all(name.casefold() in there for name in layout.has)
                 and not any(name.casefold() in there for name in layout.lacks)), None)


_URL = re.compile(r"https?://\S+", re.IGNORECASE)


def headless_columns(first: Sequence[str]) -> tuple[str, ...]:
    """The columns of a TSV without a header as CC3M (caption, URL) and CC12M (URL, caption) are, by its first cells."""
    if len(first) != 2:
        return ()
    is_url = [bool(_URL.fullmatch(cell.strip())) for cell in first]
    return {(False, True): ("caption", "url"), (True, False): ("url", "caption")}.get((is_url[0], is_url[1]), ())
