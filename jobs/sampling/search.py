"""Search databases by words, images and samples."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from jobs.sampling.queries import read_image
from jobs.telemetry import tables
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.clip_weights import ClipConfig, check_encoder
from pipeline.embeddings.embed import dataset_encoder
from pipeline.indices.searcher import Searcher
from pipeline.media.contact_sheet import contact_sheet
from pipeline.media.decode import decode
from pipeline.media.resize import to_pillow

_CELL, _COLUMNS = 128, 5  # of the contact sheet: pixels of a side, images in a row
_MOST_PIXELS = 100_000_000


@dataclass(frozen=True)
class SearchQuery:
    """A search finds what is near to the mean of all parts, and far from `minus`."""

    texts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """Image files of this machine."""
    like: tuple[str, ...] = ()
    """Samples: KEY of the first database, or DATABASE/KEY."""
    minus: tuple[str, ...] = ()
    """Words to move away from."""

    def __post_init__(self) -> None:
        if not (self.texts or self.images or self.like):
            raise ValueError("search needs words, an image or a sample\n"
                             'hint: python -m jobs search DATASET "red apple"')
        if not all(text.strip() for text in (*self.texts, *self.minus)):
            raise ValueError("the words to search for are empty\nhint: python -m jobs search DATASET \"red apple\"")


@dataclass(frozen=True)
class Match:
    """A row that a search has found."""

    database: Dataset
    score: float
    """Inner product of unit vectors: the cosine similarity."""
    sample: lookup.Sample

    @property
    def key(self) -> str:
        """The key of the sample."""
        return self.sample.key

    @property
    def caption(self) -> str:
        """The caption of the sample, "" without one."""
        return self.sample.caption

    @property
    def name(self) -> str:
        """The caption of the sample, else its file name."""
        return self.sample.name

    @property
    def distance(self) -> float:
        """The cosine distance, from 0 to 2."""
        return 1 - self.score

    def image(self) -> Image:
        """The image of the sample."""
        return to_pillow(decode(self.sample.picture, _MOST_PIXELS).image)

    def document(self) -> dict[str, Any]:
        """The match as JSON."""
        return {"database": self.database.label, "key": self.sample.key, "row": self.sample.row,
                "score": round(self.score, 4), "caption": self.sample.caption,
                "name": self.sample.name, "sha256": self.sample.sha256}


def search_databases(databases: Sequence[Dataset], query: SearchQuery, encoder: ClipConfig, count: int) -> list[Match]:
    """The `count` nearest samples of all databases, nearest first. Samples that the query names are left out.

    ValueError if a stage of a database was made from other shards than it has now: its rows would be other images.
    """
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1\nhint: --count 10")
    for database in databases:
        for stage_name in ("shards", "embeddings", "index"):
            database.identity(stage_name)
    known = {database.label: database for database in databases}
    named = [_find_sample(known, databases[0], text) for text in query.like]
    vector = _query_vector(databases, query, encoder, named)
    candidates: list[tuple[float, int, int]] = []
    for number, database in enumerate(databases):
        without = np.array([row for other, row in named if other == database], np.int64)
        searcher = Searcher(database, without if len(without) else None)
        rows, scores = searcher.search(vector[None], min(count, len(searcher)))
        candidates += [(float(score), -number, int(row))
                       for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
    best = sorted(candidates, reverse=True)[:count]
    samples = {(number, sample.row): sample for number in {number for _, number, _ in best}
               for sample in lookup.samples(databases[-number], [row for _, other, row in best if other == number])}
    return [Match(databases[-number], score, samples[number, row]) for score, number, row in best]


def _query_vector(databases: Sequence[Dataset], query: SearchQuery, encoder: ClipConfig,
                  named: Sequence[tuple[Dataset, int]]) -> np.ndarray:
    """The unit vector of a query, (D,) float32."""
    parts = [Embeddings(database).rows(np.array([row])).astype(np.float32) for database, row in named]
    minus = []
    if query.texts or query.images or query.minus:
        for database in databases:
            check_encoder(encoder, database.label, dataset_encoder(database))
        pictures = [read_image(path) for path in query.images]  # before the encoder, which takes seconds to load
        from pipeline.embeddings import clip
        loaded = clip.load_encoder(encoder)
        if query.texts:
            parts.append(loaded.texts(query.texts))
        parts += [loaded.images(loaded.prepared(picture)[None]) for picture in pictures]
        if query.minus:
            minus.append(loaded.texts(query.minus))
    vector = np.concatenate(parts).astype(np.float32).mean(0)
    if minus:
        vector -= np.concatenate(minus).astype(np.float32).mean(0)
    length = float(np.linalg.norm(vector))
    if length < 1e-3:
        raise ValueError("the query has no direction: its words are those that it moves away from, or its sample has "
                         "no vector\nhint: search for other words")
    return vector / length


def _find_sample(known: dict[str, Dataset], first: Dataset, text: str) -> tuple[Dataset, int]:
    """The database and global row of DATABASE/KEY, or of KEY in the first database."""
    label, _, rest = text.partition("/")
    database, key = (known[label], rest) if rest and label in known else (first, text)
    offset = 0
    for record in database.manifest("shards")["items"]:
        for position, row in enumerate(metadata(database, record, ["key"])):
            if row["key"] == key:
                return database, offset + position
        offset += record["samples"]
    raise ValueError(f"{database.label} has no sample {key}\n"
                     f"hint: python -m jobs search {database.label} WORDS, which shows keys")


def matches_table(matches: Sequence[Match]) -> str:
    """The matches as a table for people."""
    files = [[lookup.file_name(match.sample.url)] if any(other.caption for other in matches) else []
             for match in matches]  # without captions the name is the file name
    rows = [[f"{match.score:.3f}", match.database.label, match.sample.key, match.sample.name, *file]
            for match, file in zip(matches, files, strict=True)]
    return tables.render(rows, head=("score", "database", "key", "name", "file")[:len(rows[0]) if rows else 4],
                         right={0}, whole={1, 2})


def save_sheet(matches: Sequence[Match], out: Path) -> None:
    """Write a contact sheet of the matches, with score, key and name below each image."""
    if not matches:
        raise ValueError("no image was found, so there is no contact sheet to write")
    images = [match.image() for match in matches]
    labels = [f"{match.score:.3f} {match.sample.key}\n{match.sample.name}" for match in matches]
    sheet = contact_sheet(images, min(_COLUMNS, len(images)), labels=labels, cell=_CELL, label_lines=3)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    out.write_bytes(data.getvalue())
