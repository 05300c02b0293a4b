"""Find a row of a dataset by its key or by its name in the source, also one that was left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.lookup import file_name
from pipeline.datasets.row_columns import SCORES, list_scores
from pipeline.formats import parquet
from pipeline.stages.types import is_ledger

_STAGES = ("shards", "embeddings", "text_embeddings", "latents")
_SUCCESS = "success"


@dataclass(frozen=True)
class DatasetRow:
    """A row of the metadata of a dataset."""

    dataset: Dataset
    shard: int
    """Number of the shard."""
    shard_id: str
    position: int | None
    """The row among the samples of the shard; None if the row was left out."""
    row: int | None
    """The global row; None if the row was left out."""
    columns: dict[str, Any]
    """All columns of its parquet file."""


def find_row(dataset: Dataset, text: str) -> DatasetRow | None:
    """The row whose key or name in the source (column url) is `text`; None if there is none.

    A sample comes before a row that was left out: another try at a row may have succeeded.
    """
    offset, left_out = 0, None
    for number, record in enumerate(dataset.manifest("shards")["items"]):
        path = dataset.fetch("shards", file_of(record, ".parquet"))
        names = [name for name in ("key", "url", "status") if name in pq.read_schema(path).names]
        table = parquet.read(path, names)
        is_match = [table[name].to_numpy() == text for name in names if name != "status"]
        matches = np.flatnonzero(np.any(is_match, 0))
        if len(matches):
            succeeded = table["status"].to_numpy() == _SUCCESS
            index = int(matches[np.argmax(succeeded[matches])])
            position = int(succeeded[:index].sum())
            columns = parquet.rows(parquet.read(path).slice(index, 1))[0]
            if succeeded[index]:
                return DatasetRow(dataset, number, record["id"], position, offset + position, columns)
            left_out = left_out or DatasetRow(dataset, number, record["id"], None, None, columns)
        offset += record["samples"]
    return left_out


def names_of_file(dataset: Dataset, file: str) -> list[str]:
    """The names in the source (column url) of the rows whose last part is `file`, sorted."""
    found = set[str]()
    for record in dataset.manifest("shards")["items"]:
        path = dataset.fetch("shards", file_of(record, ".parquet"))
        if "url" in pq.read_schema(path).names:
            found |= {url for url in parquet.read(path, ["url"])["url"].to_pylist() if url and file_name(url) == file}
    return sorted(found)


def row_scores(row: DatasetRow) -> dict[str, dict[str, Any]]:
    """The scores of a sample: for each name the columns of its parquet file but the key."""
    scores = {}
    for name in list_scores(row.dataset) if row.position is not None else ():
        stage = f"{SCORES}/{name}"
        record = row.dataset.manifest(stage)["items"][row.shard]
        table = parquet.read(row.dataset.fetch(stage, file_of(record, ".parquet")))
        cells = table.slice(row.position, 1).to_pylist()[0]
        scores[name] = {column: cell for column, cell in cells.items() if column != "key"}
    return scores


def ledger_entries(dataset: Dataset, names: set[str], item: str = "") -> list[dict[str, Any]]:
    """The ledger entries about any of `names` in the sealed stages of a dataset, each with its stage.

    `item`: look only into the ledger of this item.
    """
    return [{"stage": stage, **entry} for stage in (*_STAGES, *(f"{SCORES}/{name}" for name in list_scores(dataset)))
            if dataset.is_sealed(stage) for entry in _read_ledger(dataset, stage, item) if entry.get("key") in names]


def _read_ledger(dataset: Dataset, stage: str, item: str) -> Iterator[dict[str, Any]]:
    for record in dataset.manifest(stage)["items"]:
        for entry in record["files"]:
            if is_ledger(entry["name"]) and entry["name"].rpartition("/")[2].startswith(item):
                yield from map(json.loads, dataset.fetch(stage, entry).read_text().splitlines())
