"""Columns of metadata and of scores by row, and the rows for which a row filter is true."""

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats import parquet

SCORES = "scores"


def list_scores(dataset: Dataset) -> list[str]:
    """The names of the scores that a dataset has."""
    return [name for name in sorted(storage.list_folders(dataset.folder(SCORES)))
            if dataset.is_sealed(f"{SCORES}/{name}")]


def metadata_columns(dataset: Dataset) -> list[str]:
    """The columns of the metadata of a dataset, by its first shard."""
    records = dataset.manifest("shards")["items"]
    return pq.read_schema(dataset.fetch("shards", file_of(records[0], ".parquet"))).names if len(records) else []


class RowSelection:
    """The rows of a dataset for which a row filter is true; it may name columns of metadata and of scores."""

    def __init__(self, dataset: Dataset, text: str) -> None:
        """ValueError if the filter cannot be read, or names a column that is not there, or is there twice."""
        from pipeline.rows.row_filter import RowFilter  # sqlglot, which readers of hidden rows do not need
        self.dataset, self.filter = dataset, RowFilter.parse(text)
        self.check_columns()

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        """The stages that have each column of the filter."""
        there = {f"{SCORES}/{name}": self.dataset.manifest(f"{SCORES}/{name}")["info"]["columns"]
                 for name in list_scores(self.dataset)} | {"shards": metadata_columns(self.dataset)}
        return {column: [stage for stage, names in there.items() if column in names] for column in self.filter.columns}

    def check_columns(self) -> None:
        """ValueError unless each column is in the metadata or in one score."""
        for column, stages in self._columns.items():
            if len(stages) > 1:
                raise ValueError(f"{self.filter.text} names {column}, which {self.dataset.label} has {len(stages)} "
                                 f"times: in {', '.join(stages)}\nhint: score it under another name")
            if not stages:
                raise ValueError(f"{self.filter.text} names {column}, and {self.dataset.label} has no such column: "
                                 f"expected one of {', '.join(metadata_columns(self.dataset))}, or a score "
                                 f"({', '.join(list_scores(self.dataset)) or 'there is none'})\nhint: "
                                 f"{self.dataset.command(f'{SCORES}/{column}')}")

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The scores that the filter uses, as inputs of a stage; ValueError if one is stale."""
        return {stage: self.dataset.identity(stage) for stages in self._columns.values() for stage in stages
                if stage != "shards"}

    def mask(self) -> np.ndarray:
        """Whether the filter is true for each row, (N,) bool."""
        scores = {stage: self.dataset.manifest(stage)["items"] for stage in self.inputs()}
        masks = [np.empty(0, bool)]
        for number, record in enumerate(self.dataset.manifest("shards")["items"]):
            columns: dict[str, pa.ChunkedArray] = {}
            for stage, items in [("shards", None), *scores.items()]:
                names = [column for column, stages in self._columns.items() if stages == [stage]]
                columns |= self._read(stage, items[number] if items else record, names)
            masks.append(self.filter.mask(pa.table(columns)) if columns else np.empty(0, bool))
            if len(masks[-1]) != record["samples"]:
                raise ValueError(f"shard {record['id']} of {self.dataset.label} has {len(masks[-1])} rows, its "
                                 f"manifest says {record['samples']}\nhint: python -m jobs verify")
        return np.concatenate(masks)

    def _read(self, stage: str, record: dict[str, Any], names: list[str]) -> dict[str, pa.ChunkedArray]:
        """Columns of one shard of a stage, a cell for each sample."""
        if not names:
            return {}
        status = ["status"] if stage == "shards" else []
        path = self.dataset.fetch(stage, file_of(record, ".parquet"))
        table = parquet.read(path, [*dict.fromkeys([*names, *status])])
        if missing := [name for name in names if name not in table.column_names]:
            raise ValueError(f"{path} has no column {missing[0]}, as other shards have\nhint: python -m jobs verify")
        if status:
            table = table.filter(pc.equal(table["status"], "success"))
        return {name: table[name] for name in names}
