"""A folder of pictures, with captions in a file, in texts beside them, or without."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import storage
from pipeline.media.types import SUFFIXES, BadImage
from pipeline.sources.column_types import ColumnTypes
from pipeline.sources.rows import (
    CAPTION_COLUMNS,
    Part,
    ReadReport,
    Row,
    cell_text,
    json_cells,
    parse_json_row,
    read_rows,
    write_rows,
)
from pipeline.sources.source import Source
from pipeline.storage import parquet

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_path", "path")
CAPTION_FILES = ("captions.parquet", "captions.csv", "captions.jsonl")


class FolderSource(Source):
    """Pictures below a folder, sorted by name, or in the order of their captions."""

    fetch = "file"

    def __init__(self, config: ShardConfig) -> None:
        super().__init__(config)
        if len(config.source) > 1:
            raise ValueError(f"pictures are taken from one folder, not from {len(config.source)}\n"
                             f"hint: name the folder above them, or a pattern")
        foreign = [name for name in ("where", "url_column", "image_column", "hash_column") if getattr(config, name)]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: settings for lists and tars, and {config.source[0]} is a folder "
                             f"of pictures\nhint: choose among the captions, and take --only-captioned")
        self.base, self.pattern = _split(config.source[0])
        self._listed_rows: list[Row] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The list stays on the driver. Workers read their own part.
        return super().__getstate__() | {"_listed_rows": None}

    def identity(self) -> str:
        digest = hashlib.sha256()
        for row in self._rows():
            digest.update(json.dumps([row.name, row.caption, row.columns, row.remarks, row.missing, row.caption_file],
                                     sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def column_types(self) -> dict[str, str]:
        types = ColumnTypes()
        for row in self._rows():
            types.add_row(row.columns)
        return types.by_column()

    def parts(self) -> Iterator[Part]:
        rows = iter(self._rows())
        for number in itertools.count():
            part = list(itertools.islice(rows, self.config.rows_per_shard))
            if not part:
                return
            yield write_rows(part, number, len(part))

    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        return read_rows(stage_folder, inputs)

    def read(self, row: Row) -> bytes:
        """The bytes of a row's picture; BadImage if it is gone."""
        if row.missing:
            raise BadImage("picture_missing", row.missing)
        try:
            if row.caption_file:
                caption = storage.read_bytes(storage.join(self.base, row.caption_file))
                row.caption = caption.decode("utf-8-sig", "replace").strip()
            return storage.read_bytes(storage.join(self.base, row.name))
        except FileNotFoundError:
            raise BadImage("picture_missing", "gone since it was listed") from None

    def _rows(self) -> list[Row]:
        if self._listed_rows is None:
            self._listed_rows = list(self._list())
            if not self._listed_rows:
                raise ValueError(f"no pictures in {self.config.source[0]}\nhint: files ending in "
                                 f"{', '.join(SUFFIXES)} are looked for, in folders below it too")
        return self._listed_rows

    def _list(self) -> Iterator[Row]:
        lengths: dict[str, int | None] = {}
        texts = set()
        try:
            for name, length in storage.walk(self.base):
                if name.lower().endswith(SUFFIXES) and self.pattern.fullmatch(name):
                    lengths[name] = length
                elif name.endswith(".txt"):
                    texts.add(name)
        except FileNotFoundError:
            raise ValueError(f"there is no folder {self.base}") from None
        by_name: dict[str, str] = {}
        for name in sorted(lengths):
            # macOS spells accents in two characters where a captions file has one: compare both as one,
            # unless both spellings are there as two files.
            usual = unicodedata.normalize("NFC", name)
            by_name[name if usual in lengths or usual in by_name else usual] = name
        captions, duplicates = self._captions(set(by_name))
        captions = {name: row for name, row in captions.items() if name in by_name or self.pattern.fullmatch(name)}
        if self.config.only_captioned:
            wanted = list(captions)
        else:
            wanted = [*sorted(by_name), *sorted(captions.keys() - by_name.keys())]
        for number, name in enumerate(wanted):
            file = by_name.get(name)
            columns = dict(captions.get(name, {}))
            caption = columns.pop("caption", None) or ""
            remarks = ["caption_twice"] if name in duplicates else []
            text_file = f"{(file or name).rpartition('.')[0]}.txt"
            caption_file = text_file if not captions and text_file in texts else ""
            if name not in captions and not caption_file and (captions or texts):
                remarks.append("caption_missing")
            problem = "named in the captions, not in the folder" if file is None else (
                "a link that leads nowhere" if lengths[file] is None else "")
            yield Row(number, file or name, caption, columns, remarks=remarks, caption_file=caption_file,
                      missing=problem)

    def _captions(self, names: set[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Caption rows by file name (NFC), and the names that had more than one; the first row counts."""
        address = self.config.captions
        if not address:
            there = storage.list_files(self.base)
            caption_files = [name for name in CAPTION_FILES if name in there]
            if not caption_files:
                if self.config.only_captioned:
                    raise ValueError(f"only_captioned, but {self.base} has no captions\nhint: --captions FILE")
                return {}, set()
            address = storage.join(self.base, caption_files[0])
        by_stem: dict[str, list[str]] = {}
        for name in sorted(names):
            by_stem.setdefault(name.rsplit(".", 1)[0], []).append(name)
        result: dict[str, dict[str, Any]] = {}
        duplicates = set()
        for row in _caption_rows(address, self.config.caption_column):
            name = unicodedata.normalize("NFC", row.pop("file").removeprefix("./"))
            # A name without an ending means every picture of that stem.
            for full in [name] if name in names else by_stem.get(name, [name]):
                if full in result:
                    duplicates.add(full)
                result.setdefault(full, row)
        return result, duplicates


def _split(address: str) -> tuple[str, re.Pattern[str]]:
    """A folder, and the pattern that names below it must match: * stays in a folder, ** does not."""
    if "*" not in address and "?" not in address:
        if address.lower().endswith(SUFFIXES) and storage.exists(address):
            folder, _, name = storage.normalize(address).rpartition("/")
            return folder, re.compile(re.escape(name))
        return storage.normalize(address), re.compile(".*", re.DOTALL)
    parts = address.split("/")
    first = next(number for number, part in enumerate(parts) if "*" in part or "?" in part)
    signs = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pattern = "".join(signs.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)",
                                                                           "/".join(parts[first:])))
    return (storage.normalize("/".join(parts[:first]) or ("/" if address.startswith("/") else ".")),
            re.compile(pattern, re.DOTALL))


def _caption_rows(address: str, caption_column: str) -> list[dict[str, Any]]:
    """Rows of a captions file with the keys file and caption and whatever other columns there are."""
    try:
        data = storage.read_bytes(address)
    except FileNotFoundError:
        raise ValueError(f"the captions file {address} does not exist") from None
    try:
        if address.endswith((".parquet", ".pq")):
            table = parquet.read(data)
            rows, header = parquet.rows(table), table.column_names
        elif address.endswith((".jsonl", ".ndjson")):
            rows = [parse_json_row(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
            header = list(dict.fromkeys(name for row in rows for name in row))
            rows = [dict.fromkeys(header) | row for row in rows]
        else:
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
            rows, header = [{name: row[name] for name in row if name is not None} for row in reader], list(
                reader.fieldnames or [])
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{address} cannot be read as captions: {str(error).strip()}\n"
                         f"hint: a parquet file, a CSV in UTF-8 with a header, or lines of JSON objects") from None
    file_column = next((name for name in FILE_COLUMNS if name in header), None)
    wanted = (caption_column,) if caption_column else CAPTION_COLUMNS
    caption = next((name for name in wanted if name in header), None)
    if not rows and not header:
        return []
    if file_column is None or caption is None:
        raise ValueError(f"{address} has the columns {', '.join(header)}; wanted are one of {', '.join(FILE_COLUMNS)} "
                         f"and one of {', '.join(wanted)}")
    others = [name for name in header if name not in {file_column, caption}]
    # Arrow's widest integer of a mixed column has a sign: larger ones are kept as text, the whole column alike.
    large = {name for name in others if any(isinstance(row[name], int) and row[name] >= 1 << 63 for row in rows)}
    return [json_cells({name: str(row[name]) if name in large and row[name] is not None else row[name]
                      for name in others})
            | {"file": cell_text(row[file_column]) or f"(row {number} of the captions)",
               "caption": cell_text(row[caption])}
            for number, row in enumerate(rows, 1)]
