"""The stage that reads the files of a source which look other than they did."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.media.types import BadImage
from pipeline.rows.rows import Row, read_rows, write_rows
from pipeline.stages.documents import check_shape
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output
from pipeline.versions.listing import groups
from pipeline.versions.source_diff import Hashes, SourceDiff

_FILES_PER_ITEM = 1000
_READERS = 16


class Compare(Stage):
    """The stage that reads the files which look other than they did; their hashes."""

    name = "compare"

    def __init__(self, dataset: Dataset, diff: SourceDiff, numbers: np.ndarray) -> None:
        """Read the rows of these numbers."""
        super().__init__(dataset.root, dataset.path("compare"), None)
        self.dataset, self.diff, self.numbers = dataset, diff, numbers

    @property
    def command(self) -> str:
        return f"python -m jobs rebuild {self.dataset.name} --source SOURCE --root {storage.quote(self.root)}"

    @property
    def replacement(self) -> str:
        return f"{self.command} --full"  # another version, which compares with none

    def section(self) -> dict[str, Any]:
        return {}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"pictures": {"path": "", "digest": self.diff.digest}}

    def plan(self) -> Iterator[Item]:
        for number, rows in enumerate(groups(self.diff.rows(self.numbers), _FILES_PER_ITEM)):
            part = write_rows(rows, number, len(rows))
            yield Item(f"{number:06d}", part.inputs, part.carries)

    def process(self, item: Item, scratch: Path) -> Output:
        with ThreadPoolExecutor(_READERS) as pool:
            hashes = list(pool.map(self._hash, read_rows(self.folder, item.inputs)))
        out = scratch / "hashes.json"
        out.write_bytes(storage.json_bytes(hashes))
        return Output(len(hashes), {f"{item.id}.json": out})

    def _hash(self, row: Row) -> tuple[int, str]:
        try:
            return row.number, hashlib.sha256(self.diff.source.read(row)).hexdigest()  # type: ignore[attr-defined]
        except BadImage:
            return row.number, ""

    def hashes(self, manifest: dict[str, Any]) -> Hashes:
        """The hash of each row that was read; empty where it could not be read."""
        numbers, hashes = [np.zeros(0, np.int64)], [pa.array([], pa.large_string())]
        for record in manifest["items"]:
            url = storage.file_below(self.folder, file_of(record, ".json")["name"])
            lines = check_shape(storage.read_json(url), url, [[(int, str)]], f"{self.command} --full")
            numbers.append(np.array([number for number, _ in lines], np.int64))
            hashes.append(pa.array([sha256 for _, sha256 in lines], pa.large_string()))
        return Hashes(np.concatenate(numbers), pa.concat_arrays(hashes))
