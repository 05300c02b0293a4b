"""Pictures with captions -> tars that webdataset reads, a parquet of metadata beside each.

Row i of the parquet's successes is sample i of the tar. Every row of the source ends either as a
sample or as a parquet row with a status and a reason (columns as img2dataset writes them).
"""

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import images, storage, tars
from pipeline.dataset import Dataset
from pipeline.stage import Entry, Item, Output, Plan, Stage, StageFailed, name_by_content, totals

FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_path", "path")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
_OWN_COLUMNS = ("caption", "url", "key", "status", "error_message", "width", "height", "original_width",
                "original_height", "sha256")


@dataclass(frozen=True)
class ShardConfig:
    """What to shard, and how."""

    source: str = ""
    """Folder of pictures (local or s3://), with any folders below it."""
    captions: str = ""
    """Captions: a parquet or CSV file with a column file (relative to the source) and a column
    caption; others are carried along. Default: captions.parquet or captions.csv in the source."""
    only_captioned: bool = False
    """Take only the pictures that the captions name, in their order; otherwise all, sorted by name."""
    sources: str = ""
    """JSON file on origin and licence of the pictures; its content is kept in the manifest."""
    samples_per_shard: int = 1000
    """Rows of the source in one tar."""
    image_size: int = 256
    """Short side in pixels after resizing."""
    resize: images.Resize = "center_crop"
    """center_crop: a square; keep_ratio: the whole picture; no: as it is."""
    format: images.Format = "jpg"
    """Encoding in the tar; bytes that need no change are passed through."""
    quality: int = 95
    """Quality of jpg and webp."""
    max_pixels: int = 100_000_000
    """Pictures with more pixels than this are refused before they are decoded."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"shard.quality = {self.quality}: must be within 1 and 100")
        for name in ("samples_per_shard", "image_size", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"shard.{name} must be at least 1, not {getattr(self, name)}")


class Shard(Stage):
    """The stage from a folder of pictures to the shards of a dataset."""

    name = "shard"

    def __init__(self, dataset: Dataset, config: ShardConfig) -> None:
        if not config.source:
            raise ValueError("shard needs a source\nhint: --source FOLDER")
        super().__init__(dataset.root, dataset.path("shards"), config)
        self.dataset = dataset
        self._rows: list[dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}  # the list stays on the driver; workers read their own part

    @property
    def command(self) -> str:
        return self.dataset.command("shards").replace("FOLDER", self.config.source)

    def section(self) -> dict[str, Any]:
        # Where the pictures lie is not what they are: the digest of the inputs stands for them.
        section = super().section()
        return {key: value for key, value in section.items() if key not in {"source", "captions", "sources"}}

    def inputs(self) -> dict[str, dict[str, Any]]:
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        digest.update(json.dumps(self._sources(), sort_keys=True).encode())
        return {"pictures": {"path": "", "digest": digest.hexdigest()}}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the source in order: file, bytes, caption and more columns, and problems found by listing."""
        if self._rows is None:
            self._rows = list(_rows(self.config))
            if not self._rows:
                raise ValueError(f"no pictures in {self.config.source}\nhint: files ending in "
                                 f"{', '.join(images.SUFFIXES)} are looked for, in folders below it too")
        return self._rows

    def plan(self) -> Plan:
        rows, step = self.rows(), self.config.samples_per_shard
        parts = [rows[start:start + step] for start in range(0, len(rows), step)]
        lists = ["".join(json.dumps(row, sort_keys=True) + "\n" for row in part).encode() for part in parts]
        named = [(name_by_content(f"rows/{number:06d}.jsonl", data), data) for number, data in enumerate(lists)]
        items = [Item(f"{number:06d}", {"rows": name, "count": len(part)})
                 for number, ((name, _), part) in enumerate(zip(named, parts, strict=True))]
        return Plan(items, named)

    def process(self, item: Item, scratch: Path) -> Output:
        lines = storage.read_bytes(storage.join(self.folder, item.inputs["rows"])).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        digits = max(4, len(str(self.config.samples_per_shard - 1)))
        keys = [f"{item.id}{number:0{digits}d}" for number in range(len(rows))]
        # Pillow lets go of the interpreter lock while it decodes and resizes; map keeps the order.
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(self._sample, keys, rows))
        output = Output(samples=sum(sample is not None for sample, _, _ in made))
        output.ledger = [entry for _, _, entries in made for entry in entries]
        tar, table = scratch / "shard.tar", scratch / "shard.parquet"
        tars.write(tar, (sample for sample, _, _ in made if sample is not None))
        pq.write_table(_table([row for _, row, _ in made]), table)
        output.files = {f"{item.id}.tar": tar, f"{item.id}.parquet": table}
        return output

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        counts = totals(records)
        if not counts["samples"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts["skipped"].items())
            raise StageFailed(f"shard: not one picture of {self.config.source} can be used: {reasons}\n"
                              f"hint: the ledger in {self.folder} names each")
        return Output(info={"sources": self._sources(), "format": self.config.format})

    def _sources(self) -> Any:
        return storage.read_json(self.config.sources) if self.config.sources else []

    def _sample(self, key: str, row: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any], list[Entry]]:
        """One picture: its sample (None if it failed), its parquet row, its lines in the ledger."""
        entries = [Entry(_readable(row["file"]), reason, kept=True) for reason in row.get("remarks", [])]
        extra = {name: value for name, value in row["columns"].items() if name not in _OWN_COLUMNS}
        meta = extra | {"caption": row["caption"], "url": _readable(row["file"]), "key": key, "status": "success",
                        "error_message": None, "width": None, "height": None, "original_width": None,
                        "original_height": None, "sha256": None}
        try:
            if row["bytes"] is None:
                raise images.BadPicture("picture_missing", "named in the captions, not in the folder")
            data, picture = self._picture(row["file"])
        except images.BadPicture as bad:
            entries.append(Entry(_readable(row["file"]), bad.reason, bad.detail))
            return None, meta | {"status": "failed_to_resize" if row["bytes"] is not None else "failed_to_download",
                                 "error_message": str(bad)}, entries
        entries += [Entry(_readable(row["file"]), reason, detail, kept=True) for reason, detail in picture.remarks]
        meta |= {"width": picture.image.width, "height": picture.image.height, "original_width": picture.width,
                 "original_height": picture.height, "sha256": hashlib.sha256(data).hexdigest()}
        document = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        return {"__key__": key, self.config.format: data, "json": document,
                "txt": (row["caption"] or "").encode()}, meta, entries

    def _picture(self, file: str) -> tuple[bytes, images.Decoded]:
        try:
            data = storage.read_bytes(storage.join(self.config.source, file))
        except FileNotFoundError:
            raise images.BadPicture("picture_missing", "gone since it was listed") from None
        picture = images.decode(data, self.config.max_pixels)
        resized = images.resize(picture.image, self.config.image_size, self.config.resize)
        same = resized is picture.image and picture.plain
        picture.image = resized
        if same and picture.format == {"jpg": "jpeg"}.get(self.config.format, self.config.format):
            return data, picture
        return images.encode(resized, self.config.format, self.config.quality), picture


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Metadata rows as a table with img2dataset's types, extra columns first as strings or as they are."""
    extra = sorted({name for row in rows for name in row} - set(_OWN_COLUMNS))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in extra}
    types = {"width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(), "original_height": pa.int32()}
    for name in _OWN_COLUMNS:
        columns[name] = pa.array([row[name] for row in rows], types.get(name, pa.string()))
    return pa.table(columns)


def _rows(config: ShardConfig) -> Iterator[dict[str, Any]]:
    try:
        found = {name: length for name, length in storage.walk(config.source)
                 if name.lower().endswith(images.SUFFIXES)}
    except FileNotFoundError:
        raise ValueError(f"there is no folder {config.source}") from None
    by_name: dict[str, tuple[str, int]] = {}
    for name, length in sorted(found.items()):
        # macOS spells accents in two characters where a captions file has one: compare both as one,
        # unless both spellings are there as two files.
        usual = unicodedata.normalize("NFC", name)
        by_name[name if usual in found or usual in by_name else usual] = (name, length)
    captions, duplicates = _captions(config, set(by_name))
    wanted = list(captions) if config.only_captioned else [*sorted(by_name), *sorted(captions.keys() - by_name.keys())]
    for name in wanted:
        file, length = by_name.get(name, (name, None))
        columns = captions.get(name, {})
        remarks = ["caption_twice"] if name in duplicates else []
        if captions and name not in captions:
            remarks.append("caption_missing")
        yield {"file": file, "bytes": length, "caption": columns.get("caption") or "", "remarks": remarks,
               "columns": {key: value for key, value in columns.items() if key != "caption"}}


def _captions(config: ShardConfig, names: set[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Caption rows by file name (NFC), and the names that had more than one; the first row counts."""
    address = config.captions
    if not address:
        found = [name for name in ("captions.parquet", "captions.csv") if name in storage.names(config.source)]
        if not found:
            if config.only_captioned:
                raise ValueError(f"only_captioned, but {config.source} has no captions\nhint: --captions FILE")
            return {}, set()
        address = storage.join(config.source, found[0])
    rows = _caption_rows(address)
    by_stem: dict[str, list[str]] = {}
    for name in sorted(names):
        by_stem.setdefault(name.rsplit(".", 1)[0], []).append(name)
    result: dict[str, dict[str, Any]] = {}
    duplicates = set()
    for row in rows:
        name = unicodedata.normalize("NFC", row.pop("file").removeprefix("./"))
        # A name without an ending means every picture of that stem.
        for full in [name] if name in names else by_stem.get(name, [name]):
            if full in result:
                duplicates.add(full)
            result.setdefault(full, row)
    return result, duplicates


def _caption_rows(address: str) -> list[dict[str, Any]]:
    """Rows of a captions file with the keys file and caption and whatever other columns there are."""
    try:
        data = storage.read_bytes(address)
    except FileNotFoundError:
        raise ValueError(f"the captions file {address} does not exist") from None
    try:
        if address.endswith((".parquet", ".pq")):
            table = pq.read_table(io.BytesIO(data))
            rows, header = table.to_pylist(), table.column_names
        else:
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
            rows, header = list(reader), list(reader.fieldnames or [])
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{address} cannot be read as captions: {str(error).strip()}\n"
                         f"hint: a parquet file, or a CSV in UTF-8 with a header") from None
    file_column = next((name for name in FILE_COLUMNS if name in header), None)
    caption_column = next((name for name in CAPTION_COLUMNS if name in header), None)
    if header and (file_column is None or caption_column is None):
        raise ValueError(f"{address} has the columns {', '.join(header)}; wanted are one of {', '.join(FILE_COLUMNS)} "
                         f"and one of {', '.join(CAPTION_COLUMNS)}")
    others = [name for name in header if name not in {file_column, caption_column}]
    # Arrow's widest integer of a mixed column has a sign: larger ones are kept as text, the whole column alike.
    large = {name for name in others if any(isinstance(row[name], int) and row[name] >= 1 << 63 for row in rows)}
    return [{"file": _text(row[file_column]) or f"(row {number} of the captions)",
             "caption": _text(row[caption_column]),
             **{name: str(row[name]) if name in large and row[name] is not None else _plain(row[name])
                for name in others}} for number, row in enumerate(rows, 1)]


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it, which has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _text(value: Any) -> str:
    """A cell as one text: nothing is the empty text, of a list the first counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    plain = _plain(value)
    return "" if plain is None else str(plain)


def _readable(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out, for neither JSON nor parquet can hold them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
