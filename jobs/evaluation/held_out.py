"""Captions that databases have and training does not."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.corpora.vocabulary import name_hash
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata


def held_out(dataset: Dataset, databases: Sequence[Dataset]) -> list[str]:
    """Captions of databases that the dataset of a run does not have: first those in most databases, then by lot."""
    seen = _captions(dataset)
    found = Counter(caption for database in databases for caption in _captions(database) - seen)
    return sorted(found, key=lambda caption: (-found[caption], name_hash(caption)))


def _captions(dataset: Dataset) -> frozenset[str]:
    return _captions_of(dataset, dataset.identity("shards")["digest"])


@lru_cache(maxsize=32)
def _captions_of(dataset: Dataset, content: str) -> frozenset[str]:
    return frozenset(row["caption"].strip() for record in dataset.manifest("shards")["items"]
                     for row in metadata(dataset, record, ["caption"]) if (row["caption"] or "").strip())


def rows_with(dataset: Dataset, captions: frozenset[str]) -> np.ndarray:
    """Global rows whose caption is one of these, ascending (n,) int64."""
    found, offset = [], 0
    for record in dataset.manifest("shards")["items"]:
        rows = metadata(dataset, record, ["caption"])
        found += [offset + number for number, row in enumerate(rows) if (row["caption"] or "").strip() in captions]
        offset += len(rows)
    return np.array(found, np.int64)


def item_id(way: str, database: Dataset | None) -> str:
    return f"{way}-{database.label.replace('@', '-')}" if database else way
