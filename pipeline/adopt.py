"""Tars that are there already -> shards of a dataset, sealed where they lie, without a copy.

What is written is small: for each tar a parquet of metadata in our columns, and the manifest. A tar whose rows
could part ways with its metadata later (cut off, members without a picture, links) is refused by name.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pipeline import samples, stage, storage, tars
from pipeline.dataset import Dataset
from pipeline.shard import ShardConfig
from pipeline.sources import addresses_of, plain
from pipeline.sources.tars import caption_of, local, metadata_of
from pipeline.stage import Entry, Item, Output, Stage


class Adopt(Stage):
    """The stage that makes shards of others' tars."""

    name = "shard"

    def __init__(self, dataset: Dataset, config: ShardConfig) -> None:
        if not config.source:
            raise ValueError("--adopt needs a source\nhint: --source FOLDER with tars")
        super().__init__(dataset.root, dataset.path("shards"), config)
        self.dataset = dataset
        self._addresses: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_addresses": []}

    @property
    def command(self) -> str:
        return f"{self.dataset.command('shards').replace('FOLDER', ' '.join(self.config.source))} --adopt"

    def section(self) -> dict[str, Any]:
        return {"adopted": True, "caption_column": self.config.caption_column}

    def addresses(self) -> list[str]:
        """The tars, sorted by name within each source."""
        if not self._addresses:
            self._addresses = [one for source in self.config.source for one in addresses_of(source, "tars")]
            if not self._addresses:
                raise ValueError(f"no files ending in .tar in {', '.join(self.config.source)}")
        return self._addresses

    def inputs(self) -> dict[str, dict[str, Any]]:
        found = storage.each(lambda url: json.dumps(storage.glance(url)), self.addresses())
        return {"tars": {"path": "", "digest": stage.digest(found)}}

    def plan(self) -> Iterator[Item]:
        for number, address in enumerate(self.addresses()):
            yield Item(f"{number:06d}", {"tar": address})

    def process(self, item: Item, scratch: Path) -> Output:
        address = item.inputs["tar"]
        path = local(address, scratch)
        metas, entries = [], []
        suspicions = tars.Suspicions()
        for number, sample in enumerate(tars.examine(path, suspicions)):
            meta, entry = self._meta(number, sample, address)
            metas.append(meta)
            entries += entry
        if suspicions.cut:
            raise ValueError(f"{address} is cut off {suspicions.cut}\nhint: shard it without --adopt, which takes the "
                             f"{len(metas)} samples that are whole")
        if suspicions.members:
            name, _, detail = suspicions.members[0]
            raise ValueError(f"{address}: {len(suspicions.members)} members are not adopted, the first is {name}: "
                             f"{detail}\nhint: shard it without --adopt, which leaves them out")
        good = len(metas)
        failed = _failed(address, good)
        metas += failed
        entries += [Entry(meta["url"] or meta["key"] or "", meta["status"], meta["error_message"] or "")
                    for meta in failed]
        parquet = scratch / "metadata.parquet"
        pq.write_table(samples.table(metas, samples.COLUMNS), parquet)
        described = stage.describe(address, path)
        name = address.removeprefix(f"{self.folder}/")
        return Output(good, {f"metadata/{item.id}.parquet": parquet}, entries, {"rows": len(metas)},
                      elsewhere=[described | {"name": name if "/" not in name else address}])

    def _meta(self, number: int, sample: dict[str, Any], address: str) -> tuple[dict[str, Any], list[Entry]]:
        document = metadata_of(sample)
        suffix = tars.picture_suffix(sample)
        key = sample["__key__"]
        if suffix is None:
            raise ValueError(f"{address}: the sample {key} has no picture, it has "
                             f"{', '.join(name for name in sample if name != '__key__')}\n"
                             f"hint: shard it without --adopt, which leaves such samples out")
        data = sample[suffix]
        entries = []
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            width = height = None
            entries.append(Entry(key, "unreadable", f"{type(error).__name__}: {error}", kept=True))
        extra = {name: plain(value) for name, value in document.items() if name not in samples.COLUMNS}
        hashed = document.get("sha256")
        exif = document.get("exif")
        return extra | {
            "caption": caption_of(sample, document, self.config.caption_column),
            "url": storage.without_credentials(str(document.get("url") or key)), "key": key,
            "status": samples.SUCCESS, "error_message": None, "width": width, "height": height,
            "original_width": _number(document.get("original_width")),
            "original_height": _number(document.get("original_height")),
            "exif": exif if isinstance(exif, str) else None, "sha256": hashlib.sha256(data).hexdigest(),
            "original_sha256": hashed if isinstance(hashed, str) else None, "source_row": number}, entries


def _failed(address: str, good: int) -> list[dict[str, Any]]:
    """The rows that img2dataset's parquet beside a tar names as failed."""
    beside = f"{address.removesuffix('.tar')}.parquet"
    if not storage.exists(beside):
        return []
    try:
        rows = pq.read_table(pa.BufferReader(storage.read_bytes(beside))).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{beside} cannot be read as parquet: {str(error).strip()}") from None
    if not rows or "status" not in rows[0]:
        return []
    failed = [row for row in rows if row["status"] != samples.SUCCESS]
    if len(rows) - len(failed) != good:
        raise ValueError(f"{address} has {good} samples, {beside} says {len(rows) - len(failed)}\n"
                         f"hint: was one of them cut off? shard the tar without --adopt")
    kept = [{name: plain(value) for name, value in row.items()} for row in failed]
    return [row | dict.fromkeys(samples.COLUMNS) | {
        "caption": row.get("caption") or "", "url": storage.without_credentials(str(row.get("url") or "")),
        "key": str(row.get("key") or ""), "status": row["status"], "error_message": row.get("error_message"),
        "source_row": good + number} for number, row in enumerate(kept)]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None
