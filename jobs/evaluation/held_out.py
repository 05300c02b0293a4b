"""Captions that databases have and training does not."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.corpora.vocabulary import name_hash
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.takedowns.hidden_rows import read_hidden_rows


def held_out_captions(dataset: Dataset, databases: Sequence[Dataset]) -> list[str]:
    """Captions of databases that the dataset of a run lacks: those in most databases first, otherwise at random."""
    seen = _captions_of_dataset(dataset)
    counts = Counter(caption for database in databases for caption in _captions_of_dataset(database) - seen)
    return sorted(counts, key=lambda caption: (-counts[caption], name_hash(caption)))


def _captions_of_dataset(dataset: Dataset) -> frozenset[str]:
    return _read_captions(dataset, dataset.identity("shards")["digest"])


@lru_cache(maxsize=32)
def _read_captions(dataset: Dataset, content: str) -> frozenset[str]:
    return frozenset(row["caption"].strip() for record in dataset.manifest("shards")["items"]
                     for row in metadata(dataset, record, ["caption"]) if (row["caption"] or "").strip())


def rows_with_captions(dataset: Dataset, captions: frozenset[str]) -> np.ndarray:
    """Global rows whose caption is one of these, ascending (n,) int64."""
    matching, offset = [], 0
    for record in dataset.manifest("shards")["items"]:
        rows = metadata(dataset, record, ["caption"])
        matching += [offset + number for number, row in enumerate(rows) if (row["caption"] or "").strip() in captions]
        offset += len(rows)
    return np.array(matching, np.int64)


def has_unseen_and_seen(dataset: Dataset, database: Dataset) -> bool:
    """Whether visible images of a database have captions that the dataset of a run lacks, and others have not."""
    unseen = _captions_of_dataset(database) - _captions_of_dataset(dataset)
    if not unseen:
        return False
    rows = np.setdiff1d(np.arange(database.manifest("shards")["totals"]["samples"]), read_hidden_rows(database))
    among = np.isin(rows, rows_with_captions(database, unseen))
    return bool(among.any() and not among.all())


def item_id(way: str, database: Dataset | None) -> str:
    """The id of the item of one way and one database."""
    return f"{way}-{database.label.replace('@', '-')}" if database else way
