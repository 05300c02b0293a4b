"""Tars that webdataset or img2dataset wrote, to be filtered and resized again: a shard for each."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.formats import parquet
from pipeline.layouts.column_paths import cell_at
from pipeline.media import tars
from pipeline.media.foreign_tars import packed
from pipeline.media.foreign_tars.index import MOST_MEMBERS
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from pipeline.media.sample_names import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from pipeline.rows.column_names import find_caption_columns
from pipeline.rows.column_types import ColumnTypes
from pipeline.rows.rows import Part, ReadReport, Row, json_cells
from pipeline.sources.folder_files import count_text
from pipeline.sources.source import PACKED_TARS, Source, parse_row_filter
from pipeline.tables.cells import JsonDecoder, cell_text, decode_text

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_BATCH = 64
_TYPE_MEMBERS, _TYPE_BYTES = 8 * _BATCH, 64 << 20
"""Members, and unpacked bytes, of a tar from which the types of columns are read."""
_TYPE_TARS, _TYPE_THREADS = 64, 4
"""Tars from which the types of columns are read, and how many at a time. A compressed one takes `_TYPE_BYTES`."""
# Largest number of samples of a tar. Rows of tar 3 have the numbers from 3,000,000,000 on, so no driver counts them.
STEP = 10**9
_NUMBER = re.compile("-?[0-9]{1,18}")
_USED_SUFFIXES = {"json", "cls", *CAPTION_SUFFIXES, *IMAGE_SUFFIXES}


class TarSource(Source):
    """Samples of tars, in order."""

    fetch = "none"
    kind = "tars"

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        super().__init__(config)
        if config.caption_key and config.caption_column:
            raise ValueError(f"shard.caption_key = {config.caption_key!r}, shard.caption_column = "
                             f"{config.caption_column!r}: captions of tars are in members or in their JSON\n"
                             f"hint: leave out one of --caption-key and --caption-column")
        self.addresses = addresses
        self.where = parse_row_filter(config)

    def identity(self) -> str:
        summaries = storage.map_urls(lambda url: json.dumps(storage.summarize_file(url)), self.addresses)
        return hashlib.sha256("\n".join(summaries).encode()).hexdigest()

    def column_types(self) -> dict[str, str]:
        # The URL, the caption and the key of a sample are columns of ours.
        own = {name: kind for name, kind in read_column_types(self.addresses).items()
               if name not in {"url", "caption", "key"}}
        return own | {"source_key": "string"}

    def parts(self) -> Iterator[Part]:
        for number, address in enumerate(self.addresses):
            yield Part({"tar": address, "first": number * STEP})

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        faults, images = TarFaults(), ImageChoice(self.config)
        batch: list[Row] = []
        path, ends_early = unpacked_tar(local_tar(inputs["tar"], scratch), scratch)
        samples = read_foreign_tar(path, faults, divide_names=not self.config.image_key)
        for number, sample in enumerate(samples, inputs["first"]):
            batch.append(images.row(number, sample, has_captions=bool(faults.endings & set(CAPTION_SUFFIXES))))
            if len(batch) == _BATCH:
                images.note_captions(batch)
                yield from self._filter_batch(batch, reading)
                batch = []
        images.note_captions(batch)
        yield from self._filter_batch(batch, reading)
        name = inputs["tar"].rsplit("/", 1)[-1]
        if ends_early:
            # The tar lacks its end for this reason.
            if faults.damages and faults.damages[-1].end == path.stat().st_size:
                ends_early += f"; when unpacked, it ends {faults.damages.pop()}"
            reading.remarks.append((name, "tar_cut", ends_early))
        reading.remarks += faults.remarks(name) + images.remarks(name)

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


def read_column_types(addresses: Sequence[str]) -> dict[str, str]:
    """Types of the metadata in tars, which suit the first samples of up to 64 of them, the first one included."""
    types = _tar_types(addresses[0], MOST_MEMBERS)
    others = addresses[1:]
    sampled = others[::-(-len(others) // (_TYPE_TARS - 1)) or 1]
    for more in storage.map_urls(lambda url: _tar_types(url, _TYPE_MEMBERS), sampled, threads=_TYPE_THREADS):
        types.merge(more)
    return types.by_column()


def _tar_types(address: str, most_members: int) -> ColumnTypes:
    """Types of the metadata in a tar: those of img2dataset's parquet beside it, or what its first samples have.

    `most_members`: of a tar on a local disk, index so many members.
    """
    ending = next((ending for ending in PACKED_TARS if address.endswith(ending)), ".tar")
    types, parquet_url = ColumnTypes(), f"{address.removesuffix(ending)}.parquet"
    if storage.exists(parquet_url):
        try:
            with storage.open_reader(parquet_url) as stream:
                types.add_schema(parquet.open_file(stream).schema_arrow)
            return types
        except (pa.ArrowException, OSError):
            types = ColumnTypes()  # no parquet after all
    with storage.open_reader(address) as stream:
        if packed.compression(stream):
            beginning = io.BytesIO()
            packed.unpack_tar(stream, beginning, _TYPE_BYTES)
            samples = read_foreign_tar(beginning, TarFaults())
        elif storage.is_local(address):
            samples = read_foreign_tar(storage.local_path(address), TarFaults(), most_members=most_members)
        else:
            samples = read_foreign_tar(stream, TarFaults(), most_members=_TYPE_MEMBERS)
        for sample in itertools.islice(samples, _BATCH):
            types.add_row(sample_metadata(sample, next((name for name in sample if name.endswith(".json")), "")))
    return types


def local_tar(address: str, scratch: Path) -> Path:
    """A local path of a tar, which is copied to scratch if it lies elsewhere."""
    return storage.local_path(address) if storage.is_local(address) else storage.download(
        address, scratch / "source.tar")


def unpacked_tar(path: Path, scratch: Path) -> tuple[Path, str]:
    """The path of a tar, unpacked in scratch if it is compressed; and why it ends early, "" if it is whole."""
    with open(path, "rb") as stream:
        if not packed.compression(stream):
            return path, ""
    return scratch / "unpacked.tar", packed.unpack_file(path, scratch / "unpacked.tar")


def sample_metadata(sample: dict[str, Any], image: str = "", remarks: list[str] | None = None) -> dict[str, Any]:
    """The JSON of a sample, if it is an object, and the class in its member `cls`.

    `image`: suffix of the image. `remarks` gets entries for the ledger on cells that change.
    """
    document, changed = _json_document(sample, image)
    label = {}
    if "cls" in sample:
        text, label_changed = decode_text(sample["cls"], "cls")
        label, changed = {"cls": int(text) if _NUMBER.fullmatch(text) else text}, [*changed, *label_changed]
    if remarks is not None:
        remarks += changed
    return label | (document or {})


def is_json_unreadable(sample: dict[str, Any], meta: dict[str, Any], image: str = "") -> bool:
    """Whether a sample with the metadata `meta` has JSON that is no object."""
    return not meta.keys() - {"cls"} and _json_document(sample, image)[0] is None


def _json_document(sample: dict[str, Any], image: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON of a sample, None if it is no object, and remarks on its cells."""
    data, decoder = _member_beside(sample, image, "json"), JsonDecoder()
    if data is None:
        return {}, []
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        document = decoder.decode(text)
    except (ValueError, RecursionError):
        return None, []
    return (document, decoder.take_remarks(document, text)) if isinstance(document, dict) else (None, [])


def sample_caption(sample: dict[str, Any], meta: dict[str, Any], column: str = "", key: str = "",
                   image: str = "", remarks: list[str] | None = None) -> str:
    """The caption of a sample: of the members or the column of the JSON that settings name, else of the usual ones.

    The first member with a text counts, then the JSON. `remarks` gets an entry for bytes that are not UTF-8.
    """
    if column:
        return cell_text(cell_at(meta, column))
    members = [sample.get(name) for name in _names(key)] if key else [
        _member_beside(sample, image, suffix) for suffix in CAPTION_SUFFIXES]
    for data in members:
        text, changed = decode_text(data or b"", "caption")
        if remarks is not None:
            remarks += changed
        if text:
            return text
    return "" if key else cell_text(next((meta[name] for name in find_caption_columns(meta) if meta.get(name)), None))


class ImageChoice:
    """Makes a row of each sample, and counts samples that have other images too, and members that no row takes."""

    def __init__(self, config: ShardConfig) -> None:
        self._config = config
        self._others, self._example, self._has_captions = 0, "", False
        self._unused: Counter[str] = Counter()
        self._named = {*_names(config.image_key), *_names(config.caption_key), "__key__"}

    def row(self, number: int, sample: dict[str, Any], *, has_captions: bool) -> Row:
        """The row of a sample. `has_captions`: its tar has members with captions."""
        config, (suffix, missing) = self._config, self._choose(sample)
        remarks: list[str] = []
        meta = sample_metadata(sample, suffix, remarks)
        caption = sample_caption(sample, meta, config.caption_column, config.caption_key, suffix, remarks)
        if not caption and (has_captions or config.caption_key or config.caption_column):
            remarks.append("caption_missing")
        if is_json_unreadable(sample, meta, suffix):
            remarks.append("json_unreadable")
        self._unused.update(f".{name}" for name in sample
                            if name not in self._named and name.rpartition(".")[2] not in _USED_SUFFIXES)
        return Row(number, cell_text(meta.get("url")) or sample["__key__"], caption,
                   json_cells(meta | {"source_key": sample["__key__"]}), remarks=remarks,
                   data=sample[suffix] if suffix else None, missing=missing)

    def note_captions(self, rows: Sequence[Row]) -> None:
        """Note the rows without a caption, if rows of these or of earlier ones have one in their JSON."""
        self._has_captions = self._has_captions or any(row.caption for row in rows)
        for row in rows if self._has_captions else ():
            if not row.caption and "caption_missing" not in row.remarks:
                row.remarks.append("caption_missing")

    def remarks(self, tar_name: str) -> list[tuple[str, str, str]]:
        """(key, reason, detail) of samples with several images and of members of no use, for the ledger."""
        others = [(tar_name, "other_images", f"{self._others} samples have images beside the one that was taken, as "
                                             f"{self._example}; --image-key takes another")] if self._others else []
        return [*others, *([(tar_name, "unused_members", count_text(self._unused))] if self._unused else [])]

    def _choose(self, sample: dict[str, Any]) -> tuple[str, str]:
        """The suffix of the image of a sample, or "" and why it has none."""
        if key := self._config.image_key:
            suffix = next((name for name in _names(key) if name in sample), "")
            names = ", ".join(name for name in sample if name != "__key__")
            return suffix, "" if suffix else f"the sample has no {key}, it has {names}"
        images = [name for name in sample if name.rpartition(".")[2] in IMAGE_SUFFIXES]
        suffix = tars.image_suffix(sample) or (images[0] if len(images) == 1 else "")
        if not suffix:
            return "", (f"the sample has several images: {', '.join(images)}; --image-key takes one" if images else
                        "the sample has no image")
        if len(images) > 1:
            self._others += 1
            self._example = self._example or f"{sample['__key__']}.{next(name for name in images if name != suffix)}"
        return suffix, ""


def _names(key: str) -> list[str]:
    """The suffixes that a setting names, as in jpg;image.png."""
    return [name.strip().lstrip(".").lower() for name in key.split(";")]


def _member_beside(sample: dict[str, Any], image: str, suffix: str) -> bytes | None:
    """The member of a sample with a suffix; a sample with 1.jpg has 1.txt or txt."""
    stem = image.rpartition(".")[0]
    return sample.get(f"{stem}.{suffix}", sample.get(suffix)) if stem else sample.get(suffix)
