"""Tars that webdataset or img2dataset wrote, to be filtered and resized anew: a shard for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.media import tars
from pipeline.media.foreign_tars import TarFaults, read_foreign_tar
from pipeline.sources.column_names import find_caption_columns
from pipeline.sources.column_types import ColumnTypes
from pipeline.sources.rows import Part, ReadReport, Row, cell_text, json_cells
from pipeline.sources.source import Source, parse_row_filter

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_BATCH = 64
# Of how many samples a tar has at most: rows of tar 3 are numbered from 3,000,000,000 on, and no driver need count.
STEP = 10**9


class TarSource(Source):
    """Samples of tars, in order."""

    fetch = "none"
    kind = "tars"

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        super().__init__(config)
        self.addresses = addresses
        self.where = parse_row_filter(config)

    def identity(self) -> str:
        summaries = storage.map_urls(lambda url: json.dumps(storage.summarize_file(url)), self.addresses)
        return hashlib.sha256("\n".join(summaries).encode()).hexdigest()

    def column_types(self) -> dict[str, str]:
        # The URL, the caption and the key of a sample are columns of ours.
        own = {name: kind for name, kind in read_column_types(self.addresses[0]).items()
               if name not in {"url", "caption", "key"}}
        return own | {"source_key": "string"}

    def parts(self) -> Iterator[Part]:
        for number, address in enumerate(self.addresses):
            yield Part({"tar": address, "first": number * STEP})

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        faults = TarFaults()
        batch: list[Row] = []
        samples = read_foreign_tar(local_tar(inputs["tar"], scratch), faults)
        for number, sample in enumerate(samples, inputs["first"]):
            batch.append(_sample_row(number, sample, self.config.caption_column))
            if len(batch) == _BATCH:
                yield from self._filter_batch(batch, reading)
                batch = []
        yield from self._filter_batch(batch, reading)
        reading.remarks += faults.remarks(inputs["tar"].rsplit("/", 1)[-1])

    def _filter_batch(self, batch: list[Row], reading: ReadReport) -> list[Row]:
        if self.where is None or not batch:
            return batch
        columns = {}
        for name in self.where.columns:
            cells = [row.caption if name == "caption" else row.columns.get(name) for row in batch]
            try:
                columns[name] = pa.array(cells)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                columns[name] = pa.array([None if cell is None else cell_text(cell) for cell in cells], pa.string())
        passing = np.flatnonzero(self.where.mask(self.where.cast(pa.table(columns))))
        reading.filtered += len(batch) - len(passing)
        return [batch[number] for number in passing]


def read_column_types(address: str) -> dict[str, str]:
    """Types of the metadata in a tar: those of img2dataset's parquet beside it, or what its first samples have."""
    types, parquet_url = ColumnTypes(), f"{address.removesuffix('.tar')}.parquet"
    if storage.exists(parquet_url):
        try:
            with storage.open_reader(parquet_url) as stream:
                types.add_schema(pq.read_schema(stream))
            return types.by_column()
        except (pa.ArrowException, OSError):
            types = ColumnTypes()  # no parquet after all
    with storage.open_reader(address) as stream:
        for sample in itertools.islice(read_foreign_tar(stream, TarFaults()), _BATCH):
            types.add_row(sample_metadata(sample))
    return types.by_column()


def local_tar(address: str, scratch: Path) -> Path:
    """A local path of a tar, which is copied to scratch if it lies elsewhere."""
    return storage.local_path(address) if storage.is_local(address) else storage.download(
        address, scratch / "source.tar")


def sample_metadata(sample: dict[str, Any]) -> dict[str, Any]:
    """What the JSON of a sample says, if it is an object, and the class in its member `cls`."""
    try:
        document = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        document = {}
    label = {"cls": _label(sample["cls"])} if "cls" in sample else {}
    return label | document if isinstance(document, dict) else label


def _label(data: bytes) -> int | str:
    """The number or the name of a class."""
    text = data.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text


def sample_caption(sample: dict[str, Any], meta: dict[str, Any], column: str = "") -> str:
    """The caption of a sample: its text, or what its JSON has under a usual name."""
    if column:
        return cell_text(meta.get(column))
    if "txt" in sample:
        return sample["txt"].decode("utf-8", "replace").strip()
    return cell_text(next((meta[name] for name in find_caption_columns(meta) if meta.get(name)), None))


def _sample_row(number: int, sample: dict[str, Any], caption_column: str) -> Row:
    meta = sample_metadata(sample)
    suffix = tars.image_suffix(sample)
    columns = json_cells(meta | {"source_key": sample["__key__"]})
    return Row(number, cell_text(meta.get("url")) or sample["__key__"],
               sample_caption(sample, meta, caption_column), columns,
               data=sample[suffix] if suffix else None, missing="" if suffix else "the sample has no picture")
