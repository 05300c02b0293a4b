"""Samples that searches must not find any more, though they are still in a dataset and its index.

    tombstones/   rows.npy, global rows, by keys that were named or by a row filter; keys are not kept

Nothing is built again: each search of the database leaves these rows out. The next version does without them.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.datasets.row_columns import RowSelection
from pipeline.formats import arrays
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output
from pipeline.storage import digest
from pipeline.takedowns import takedowns


class Tombstones(Stage):
    """The stage from a file of keys, one in each line, or a row filter to the rows that searches leave out."""

    name = "tombstones"

    def __init__(self, dataset: Dataset, keys: str = "", hide: str = "") -> None:
        """`hide`: a row filter over metadata and scores; rows for which it is true are hidden too."""
        super().__init__(dataset.root, dataset.path("tombstones"), None)
        self.dataset, self.keys, self.hide = dataset, storage.normalize(keys) if keys else "", hide

    @property
    def command(self) -> str:
        return self.dataset.command("tombstones")

    @property
    def alternative(self) -> str:
        return "name all keys in one file, or all conditions in one expression"

    def section(self) -> dict[str, Any]:
        return {"hide": self.hide} if self.hide else {}

    def inputs(self) -> dict[str, dict[str, Any]]:
        keys = hashlib.sha256("\n".join(sorted(self._named())).encode()).hexdigest()
        inputs = {"shards": self.dataset.identity("shards"), "keys": {"path": "", "digest": keys}}
        return inputs | (RowSelection(self.dataset, self.hide).inputs() if self.hide else {})

    def plan(self) -> list[Item]:
        if self.hide:
            RowSelection(self.dataset, self.hide)
        if not self.keys:
            return [Item("tombstones")]
        named = self._named()
        records = self.dataset.manifest("shards")["items"]
        if not any(row["key"] in named for record in records for row in metadata(self.dataset, record, ["key"])):
            raise ValueError(f"{self.dataset.label} has none of the keys in {self.keys}\n"
                             f"hint: keys as samples.json and credits name them")
        return [Item("tombstones")]

    def process(self, item: Item, scratch: Path) -> Output:
        named, rows, offset = self._named(), [], 0
        present: set[str] = set()
        for record in self.dataset.manifest("shards")["items"]:
            keys = [row["key"] for row in metadata(self.dataset, record, ["key"])]
            rows += [offset + position for position, key in enumerate(keys) if key in named]
            present.update(named.intersection(keys))
            offset += record["samples"]
        if self.hide:
            rows = np.union1d(rows, np.flatnonzero(RowSelection(self.dataset, self.hide).mask())).tolist()
        np.save(scratch / "rows.npy", np.array(rows, np.int64), allow_pickle=False)
        return Output(samples=len(rows), files={"rows.npy": scratch / "rows.npy"},
                      ledger=[Entry(key, "not in this dataset") for key in sorted(named - present)])

    def _named(self) -> set[str]:
        if not self.keys:
            return set()
        try:
            text = storage.read_bytes(self.keys).decode()
        except FileNotFoundError:
            raise ValueError(f"there is no file {self.keys}\nhint: --tombstone names a text file with a key in each "
                             f"line") from None
        named = {line.strip() for line in text.splitlines()} - {""}
        if not named:
            raise ValueError(f"{self.keys} names no key\nhint: a text file with a key in each line")
        return named


def read_hidden_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a dataset that must not be found, ascending (T,) int64; ValueError if its shards changed since.

    With those that were forgotten since it was made.
    """
    return np.union1d(read_tombstones(dataset), takedowns.read_forgotten_rows(dataset))


def read_tombstones(dataset: Dataset) -> np.ndarray:
    """The rows of a dataset that the stage hides, ascending (T,) int64; ValueError if its shards changed since."""
    if not dataset.is_sealed("tombstones"):
        return np.array([], np.int64)
    dataset.identity("tombstones")
    entry = dataset.manifest("tombstones")["items"][0]["files"]
    return arrays.load_array(dataset.fetch("tombstones", next(file for file in entry if file["name"] == "rows.npy")))


def hidden_row_inputs(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The hidden rows, as inputs of a stage that searches. Empty if there are none."""
    inputs = {"tombstones": dataset.identity("tombstones")} if dataset.is_sealed("tombstones") else {}
    if len(hidden := takedowns.read_forgotten_rows(dataset)):
        inputs["forgotten"] = {"path": "", "digest": digest(hidden.tolist())}
    return inputs
