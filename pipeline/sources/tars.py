"""Tars that webdataset or img2dataset wrote, to be filtered and resized anew: a shard for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import storage, tars
from pipeline.sources import CAPTION_COLUMNS, Part, Reading, Row, Source, plain, text, where_of

if TYPE_CHECKING:
    from pipeline.shard import ShardConfig

_BATCH = 64


class Tars(Source):
    """Samples of tars, in order."""

    fetch = "none"

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        super().__init__(config)
        self.addresses = addresses
        self.where = where_of(config)

    def identity(self) -> str:
        found = storage.each(lambda url: json.dumps(storage.glance(url)), self.addresses)
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def parts(self) -> Iterator[Part]:
        for address in self.addresses:
            yield Part({"tar": address})

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: Reading) -> Iterator[Row]:
        suspicions = tars.Suspicions()
        batch: list[Row] = []
        for number, sample in enumerate(tars.examine(local(inputs["tar"], scratch), suspicions)):
            batch.append(_row(number, sample, self.config.caption_column))
            if len(batch) == _BATCH:
                yield from self._passing(batch, reading)
                batch = []
        yield from self._passing(batch, reading)
        reading.remarks += suspicions.members
        if suspicions.cut:
            reading.remarks.append((inputs["tar"].rsplit("/", 1)[-1], "tar_cut", suspicions.cut))

    def _passing(self, batch: list[Row], reading: Reading) -> list[Row]:
        if self.where is None or not batch:
            return batch
        columns = {}
        for name in self.where.columns:
            cells = [row.caption if name == "caption" else row.columns.get(name) for row in batch]
            try:
                columns[name] = pa.array(cells)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                columns[name] = pa.array([None if cell is None else text(cell) for cell in cells], pa.string())
        passing = np.flatnonzero(self.where.mask(self.where.cast(pa.table(columns))))
        reading.filtered += len(batch) - len(passing)
        return [batch[number] for number in passing]


def local(address: str, scratch: Path) -> Path:
    """A local path of a tar, which is copied to scratch if it lies elsewhere."""
    return storage.local_path(address) if storage.is_local(address) else storage.download(
        address, scratch / "source.tar")


def metadata_of(sample: dict[str, Any]) -> dict[str, Any]:
    """What the JSON of a sample says, {} if there is none or it is no object."""
    try:
        document = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def caption_of(sample: dict[str, Any], meta: dict[str, Any], column: str = "") -> str:
    """The caption of a sample: its text, or what its JSON has under a usual name."""
    if column:
        return text(meta.get(column))
    if "txt" in sample:
        return sample["txt"].decode("utf-8", "replace").strip()
    return text(next((meta[name] for name in CAPTION_COLUMNS if meta.get(name)), None))


def _row(number: int, sample: dict[str, Any], caption_column: str) -> Row:
    meta = metadata_of(sample)
    suffix = tars.picture_suffix(sample)
    columns = {name: plain(value) for name, value in meta.items()} | {"source_key": sample["__key__"]}
    return Row(number, text(meta.get("url")) or sample["__key__"], caption_of(sample, meta, caption_column), columns,
               data=sample[suffix] if suffix else None, missing="" if suffix else "the sample has no picture")
