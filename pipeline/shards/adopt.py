"""Existing tars -> shards of a dataset, sealed in place, without a copy.

It writes one parquet of metadata for each tar, and the manifest. A tar is refused by name if its rows could later
differ from its metadata: it is cut, or it has members without an image, or links.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.formats import parquet
from pipeline.media import tars
from pipeline.media.decode import read_size
from pipeline.media.foreign_tars.packed import compression
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from pipeline.media.types import BadImage
from pipeline.rows.rows import json_cells, redact_cells, split_remark
from pipeline.shards import metadata
from pipeline.sources.config import ShardConfig
from pipeline.sources.source import list_all_files
from pipeline.sources.tars import (
    STEP,
    is_json_unreadable,
    local_tar,
    read_column_types,
    sample_caption,
    sample_metadata,
)
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.tables.cells import replace_surrogates
from pipeline.takedowns import takedowns


class Adopt(Stage):
    """The stage that makes shards of others' tars."""

    name = "shard"

    def __init__(self, dataset: Dataset, config: ShardConfig) -> None:
        if not config.source:
            raise ValueError("--adopt needs a source\nhint: --source FOLDER with tars")
        usual = {"where": "", "licenses": "", "duplicates": "keep", "patches": 0, "min_size": 0, "image_key": ""}
        filters = [name for name, setting in usual.items() if getattr(config, name) != setting]
        if filters:
            raise ValueError(f"--adopt takes tars as they are, and not {', '.join(filters)}\n"
                             f"hint: without --adopt they are filtered and resized into new ones")
        super().__init__(dataset.root, dataset.path("shards"), config)
        self.dataset = dataset
        self._addresses: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_addresses": []}

    @property
    def command(self) -> str:
        return f"{self.dataset.command('shards').replace('FOLDER', ' '.join(self.config.source))} --adopt"

    def section(self) -> dict[str, Any]:
        section = {"adopted": True, "caption_column": self.config.caption_column}
        return section | ({"caption_key": self.config.caption_key} if self.config.caption_key else {})

    def addresses(self) -> list[str]:
        """The tars, sorted by name within each source, each once."""
        if not self._addresses:
            self._addresses = list_all_files(self.config.source, "tars")
            if not self._addresses:
                raise ValueError(f"no files ending in .tar in {', '.join(self.config.source)}")
            if inside := [url for url in self._addresses if url.startswith(f"{self.folder}/")]:
                raise ValueError(f"{inside[0]} lies where the dataset is written, and --overwrite would remove it\n"
                                 f"hint: move the tars to a folder of their own")
        return self._addresses

    def summary(self) -> dict[str, Any]:
        return {"kind": "tars", "files": len(self.addresses())}

    def inputs(self) -> dict[str, dict[str, Any]]:
        summaries = storage.map_urls(lambda url: json.dumps(storage.summarize_file(url)), self.addresses())
        return {"tars": {"path": "", "digest": storage.digest(summaries)}}

    def plan(self) -> Iterator[Item]:
        types = read_column_types(self.addresses())
        data = storage.json_bytes(types)
        name = storage.name_by_content("rows/types.json", data)
        for number, address in enumerate(self.addresses()):
            yield Item(f"{number:06d}", {"tar": address, "first": number * STEP, "types": name},
                       () if number else ((name, data),))

    def after_seal(self) -> None:
        takedowns.apply_list_to_new(self.dataset)

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        if not any(record["samples"] for record in records):
            raise StageFailed(f"shard: no image of {', '.join(self.config.source)} can be adopted: "
                              f"{len(self.addresses())} tars without a sample\nhint: list them with tar -tf")
        return super().finish(records, scratch)

    def process(self, item: Item, scratch: Path) -> Output:
        address = item.inputs["tar"]
        path = local_tar(address, scratch)
        with open(path, "rb") as stream:
            if kind := compression(stream):
                raise ValueError(f"{address} is compressed ({kind}), so its samples cannot be read where they lie\n"
                                 f"hint: shard it without --adopt, or unpack it")
        metas, entries = [], []
        faults = TarFaults()
        for number, sample in enumerate(read_foreign_tar(path, faults), item.inputs["first"]):
            meta, entry = self._meta(number, sample, address)
            metas.append(meta)
            entries += entry
        _check_adoptable(address, faults, len(metas))
        good = len(metas)
        entries += [Entry(name, reason, detail, kept=True)
                    for name, reason, detail in faults.remarks(address.rsplit("/", 1)[-1])]
        failed = _failed(address, good, item.inputs["first"])
        metas += failed
        entries += [Entry(meta["url"] or meta["key"] or "", meta["status"], meta["error_message"] or "")
                    for meta in failed]
        parquet = scratch / "metadata.parquet"
        types = storage.read_json(storage.file_below(self.folder, item.inputs["types"]))
        table = metadata.metadata_table(metas, metadata.COLUMNS, types)
        entries += [Entry(address.rsplit("/", 1)[-1], "column_type", detail, kept=True)
                    for detail in metadata.changed_types(table, types, metadata.COLUMNS)]
        pq.write_table(metadata.add_image_positions(table, tars.image_positions(path)), parquet)
        return Output(good, {f"metadata/{item.id}.parquet": parquet}, entries, {"rows": len(metas)},
                      external_files=[storage.describe_file(address, path)])

    def _meta(self, number: int, sample: dict[str, Any], address: str) -> tuple[dict[str, Any], list[Entry]]:
        remarks: list[str] = []
        document = sample_metadata(sample, remarks=remarks)
        suffix = tars.image_suffix(sample)
        key = sample["__key__"]
        if suffix is None:
            raise ValueError(f"{address}: the sample {key} has no image, it has "
                             f"{', '.join(name for name in sample if name != '__key__')}\n"
                             f"hint: shard it without --adopt, which leaves such samples out")
        if replace_surrogates(key) != key:
            raise ValueError(f"{address}: the name {key!r} is not UTF-8, as metadata must be\n"
                             f"hint: shard it without --adopt, which gives samples other names")
        data = sample[suffix]
        entries = [Entry(key, "json_unreadable", kept=True)] if is_json_unreadable(sample, document) else []
        width: int | None
        height: int | None
        try:
            width, height = read_size(data)
        except BadImage as bad:
            width = height = None
            entries.append(Entry(key, "unreadable", str(bad), kept=True))
        extra = redact_cells(json_cells(
            {name: value for name, value in document.items() if name not in metadata.COLUMNS}))
        caption = sample_caption(sample, document, self.config.caption_column, self.config.caption_key,
                                 remarks=remarks)
        entries += [Entry(key, *split_remark(remark), kept=True) for remark in remarks]
        hashed = document.get("sha256")
        exif = document.get("exif")
        return extra | {
            "caption": caption,
            "url": storage.redact_url(replace_surrogates(str(document.get("url") or key))), "key": key,
            "status": metadata.SUCCESS, "error_message": None, "width": width, "height": height,
            "original_width": _number(document.get("original_width")),
            "original_height": _number(document.get("original_height")),
            "exif": replace_surrogates(exif) if isinstance(exif, str) else None,
            "sha256": hashlib.sha256(data).hexdigest(),
            "original_sha256": replace_surrogates(hashed) if isinstance(hashed, str) else None,
            "source_row": number}, entries


def _check_adoptable(address: str, faults: TarFaults, good: int) -> None:
    """ValueError if other readers of a tar would find other samples in it."""
    if faults.cut:
        raise ValueError(f"{address} is cut off or damaged: {faults.cut}\nhint: shard it without --adopt, which "
                         f"takes the {good} samples that are whole")
    if faults.end_marks:
        raise ValueError(f"{address} continues with another tar after the end mark at byte {faults.end_marks[0]}, and "
                         f"other programs stop there\nhint: shard it without --adopt, which takes the samples of all")
    if faults.is_apart:
        raise ValueError(f"{address}: the members of a sample do not follow each other\n"
                         f"hint: shard it without --adopt, which joins them by key")
    if faults.has_repeats:
        raise ValueError(f"{address}: two samples with one key follow each other, which other programs join\n"
                         f"hint: shard it without --adopt, which takes both")
    if refused := [member for member in faults.members if member[1] != "ignored_member"]:
        (name, _, detail), count = refused[0], len(refused) + faults.unnamed.total() - faults.unnamed["ignored_member"]
        raise ValueError(f"{address}: {count} members are not adopted, the first is {name}: {detail}\n"
                         f"hint: shard it without --adopt, which leaves them out")


def _failed(address: str, good: int, first: int) -> list[dict[str, Any]]:
    """The rows that img2dataset's parquet beside a tar names as failed; `first`: number of the tar's first row."""
    parquet_url = f"{address.removesuffix('.tar')}.parquet"
    if not storage.exists(parquet_url):
        return []
    try:
        rows = parquet.rows(parquet.read(storage.read_bytes(parquet_url)))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{parquet_url} cannot be read as parquet: {str(error).strip()}") from None
    if not rows or "status" not in rows[0]:
        return []
    failed = [row for row in rows if row["status"] != metadata.SUCCESS]
    if len(rows) - len(failed) != good:
        raise ValueError(f"{address} has {good} samples, {parquet_url} says {len(rows) - len(failed)}\n"
                         f"hint: was one of them cut off? shard the tar without --adopt")
    kept = [redact_cells(json_cells(row)) for row in failed]
    return [row | dict.fromkeys(metadata.COLUMNS) | {
        "caption": str(row.get("caption") or ""), "url": storage.redact_url(str(row.get("url") or "")),
        "key": str(row.get("key") or ""), "status": str(row["status"]),
        "error_message": storage.redact_credentials(str(row.get("error_message") or "")),
        "source_row": first + good + number} for number, row in enumerate(kept)]


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 31 else None
