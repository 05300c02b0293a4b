"""The files of a folder of images: images, what describes them, and what is ignored."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from pipeline.media.sample_names import system_folder
from pipeline.media.types import SUFFIXES

CAPTION_FILES = ("captions.parquet", "captions.csv", "captions.jsonl")
METADATA_FILES = ("metadata.parquet", "metadata.csv", "metadata.jsonl", "wikiart.csv")
"""Hugging Face's ImageFolder has one at the top, or one in the folder of each split. WikiArt has one at the top."""
TEXT_SUFFIXES = (".txt", ".caption")


@dataclass
class FolderFiles:
    """The files of a folder, by relative names with / between folders."""

    images: dict[str, int | None] = field(default_factory=dict)
    """Name -> bytes; None: a broken link."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Name of an image without its suffix -> the texts beside it, one of each suffix, in the order of these."""
    documents: dict[str, str] = field(default_factory=dict)
    """Name of an image, with or without its suffix -> the JSON beside it."""
    tables: list[str] = field(default_factory=list)
    """Tables of captions, the deepest folders first; one of each folder."""
    shard_tables: list[str] = field(default_factory=list)
    """Parquet files that img2dataset writes beside a folder of images: 00000.parquet beside 00000."""
    has_texts: bool = False
    """Whether there is any .txt, or a text or JSON beside an image: an image without one lacks its caption then."""
    ignored: Counter[str] = field(default_factory=Counter)
    """How many files are of no use, by suffix or by system folder."""


def sort_files(listed: Iterable[tuple[str, int | None]]) -> FolderFiles:
    """The files of a folder by what they are for."""
    files, others = FolderFiles(), []
    for name, length in listed:
        files.has_texts |= name.endswith(".txt")
        if (folder := system_folder(name)):
            files.ignored[f"{folder}/"] += 1
        elif name.lower().endswith(SUFFIXES):
            files.images[name] = length
        else:
            others.append(name)
    stems = {stem_of(name) for name in files.images}
    folders = {name.rpartition("/")[0] for name in files.images}
    texts: list[dict[str, str]] = [{} for _ in TEXT_SUFFIXES]
    tables: dict[str, list[str]] = {}
    spellings = _Spellings(stems | files.images.keys())
    # A text with the very name of an image comes before one whose accents are spelled otherwise.
    for name in sorted(others, key=lambda name: (spellings.of_image(stem_of(name)) != stem_of(name), name)):
        stem, suffix = spellings.of_image(stem_of(name)), name[len(stem_of(name)):].lower()
        folder, _, base = name.rpartition("/")
        companions = (texts[TEXT_SUFFIXES.index(suffix)] if suffix in TEXT_SUFFIXES and stem in stems else
                      files.documents if suffix == ".json" and (stem in stems or stem in files.images) else None)
        if companions is not None and stem not in companions:
            companions[stem] = name
        elif base in METADATA_FILES or (base in CAPTION_FILES and not folder):
            tables.setdefault(folder, []).append(name)
        elif suffix == ".parquet" and stem in folders:
            files.shard_tables.append(name)
        else:
            files.ignored[suffix_of(name)] += 1
    for stem, name in (each for named in texts for each in named.items()):
        files.texts.setdefault(stem, []).append(name)
    files.has_texts |= bool(files.texts or files.documents)
    for folder in sorted(tables, key=lambda folder: (-folder.count("/") - bool(folder), folder)):
        by_rank = sorted(tables[folder], key=lambda name: _TABLE_RANK[name.rpartition("/")[2]])
        files.tables.append(by_rank[0])
        files.ignored.update(suffix_of(name) for name in by_rank[1:])
    return files


class _Spellings:
    """Names of images, to find the one that is equal but for the spelling of its accents."""

    def __init__(self, names: AbstractSet[str]) -> None:
        self._names = names
        self._by_usual: dict[str, str | None] = {}
        for name in names:
            if not name.isascii():
                usual = usual_accents(name)
                self._by_usual[usual] = None if usual in self._by_usual else name

    def of_image(self, name: str) -> str:
        """The name as its image has it; the name itself if no image has it, or if two do in different spellings."""
        return name if name in self._names else self._by_usual.get(usual_accents(name)) or name


_TABLE_RANK = {name: rank for rank, name in enumerate((*CAPTION_FILES, *METADATA_FILES))}


def stem_of(name: str) -> str:
    """A name without the last suffix of its file."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0] or base}"


def suffix_of(name: str) -> str:
    """The last suffix of a file in small letters, as .md; its whole name if it has none."""
    base = name.rpartition("/")[2].lower()
    return f".{base.rpartition('.')[2]}" if "." in base else base


def usual_accents(name: str) -> str:
    """A name with accents as one character, as captions spell them; macOS stores them as two."""
    return unicodedata.normalize("NFC", name)


def count_text(counts: Counter[str]) -> str:
    """Counts as a text, the most frequent first: 12 .md, 3 .psd."""
    shown = [f"{count} {name}" for name, count in counts.most_common(10)]
    left = counts.total() - sum(count for _, count in counts.most_common(10))
    return ", ".join([*shown, *([f"{left} of other kinds"] if left else [])])
