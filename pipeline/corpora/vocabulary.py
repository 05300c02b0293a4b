"""The content of a corpus of images before it is rendered: subjects, styles and words."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Drawing = TypeVar("Drawing")


@dataclass(frozen=True)
class CatalogImage:
    """One image of a corpus: a subject in a style, and the words that go with it.

    The style is not in the caption; `tags` are search words that add to it. A held-out subject
    is held out in every style, so it may not be met in training at all.
    """

    style: str
    subject: str
    caption: str
    tags: tuple[str, ...]
    held_out: bool

    @property
    def key(self) -> str:
        """`style/subject`, unique within a catalog."""
        return f"{self.style}/{self.subject}"


@dataclass(frozen=True)
class Catalog(Generic[Drawing]):
    """Images in order of (style, subject), and the input of `render` for each, by key."""

    pictures: tuple[CatalogImage, ...]
    drawings: Mapping[str, Drawing]

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles, sorted."""
        return tuple(sorted({picture.style for picture in self.pictures}))

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the subjects, sorted, held-out ones included."""
        return tuple(sorted({picture.subject for picture in self.pictures}))


def name_hash(name: str) -> int:
    """A number of 64 bits that depends on a name, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
