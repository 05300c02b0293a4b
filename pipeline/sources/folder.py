"""A folder of images, with captions in tables, in texts or JSON beside them, or without."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import storage
from pipeline.layouts.column_paths import cell_at
from pipeline.layouts.folders import FolderLayout, find_folder_layout, fits_layout, folder_cells
from pipeline.media.foreign_tars.samples import MOST_JSON_BYTES, MOST_SAMPLE_BYTES
from pipeline.media.types import SUFFIXES, BadImage
from pipeline.rows import img2dataset
from pipeline.rows.column_names import find_caption_columns, is_more_than_caption
from pipeline.rows.column_types import ColumnTypes
from pipeline.rows.rows import (
    BAD_ROW,
    NOT_IN_FOLDER,
    Part,
    ReadReport,
    Row,
    hashable_cells,
    json_cells,
    read_rows,
    write_rows,
)
from pipeline.sources.captions import CaptionTables, names_by_stem
from pipeline.sources.folder_files import FolderFiles, count_text, sort_files, stem_of, suffix_of, usual_accents
from pipeline.sources.source import Source
from pipeline.tables.cells import MOST_LETTERS, JsonDecoder, cell_text, decode_text
from pipeline.tables.parquet_tables import read_schema

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)
_SAMPLED_DOCUMENTS = 64
"""So many of the JSON files beside images are read to learn the types of their columns."""


class FolderSource(Source):
    """Images below a folder, sorted by name, or in the order of their captions."""

    fetch = "file"
    kind = "pictures"

    def __init__(self, config: ShardConfig, listed: Iterable[tuple[str, int | None]] | None = None) -> None:
        """`listed`: what `storage.walk` gives for the folder of the source, if that is known."""
        super().__init__(config)
        if len(config.source) > 1:
            raise ValueError(f"images are taken from one folder, not from {len(config.source)}\n"
                             f"hint: name the folder above them, or a pattern")
        foreign = [name for name in ("where", "url_column", "image_column", "hash_column") if getattr(config, name)]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: settings for lists and tars, and {config.source[0]} is a folder "
                             f"of images\nhint: choose among the captions, and take --only-captioned")
        self.base, self.pattern = split_pattern(config.source[0])
        self._listed = listed
        self._listed_rows: list[Row] | None = None
        self._shard_schema = pa.schema([])
        self._layout: FolderLayout | None = None
        self._layout_columns: dict[int, set[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The list stays on the driver. Workers read their own part.
        return super().__getstate__() | {"_listed_rows": None, "_listed": None, "_layout": None, "_layout_columns": {}}

    def count_files(self) -> int:
        return sum(row.missing != NOT_IN_FOLDER and not row.reason for row in self._rows())

    def identity(self) -> str:
        digest = hashlib.sha256()
        for row in self._rows():
            # A layout reads these columns from the name, and earlier versions did not have them.
            derived = self._layout_columns.get(row.number, set())
            columns = {name: cell for name, cell in row.columns.items() if name not in derived}
            remarks = [remark for remark in row.remarks if remark != _EMPTY_CAPTION]  # earlier versions lacked it
            facts = [row.name, row.caption, hashable_cells(columns), remarks, row.missing, row.caption_file]
            digest.update(json.dumps([*facts, *row.more_files], sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def column_types(self) -> dict[str, str]:
        types = ColumnTypes()
        for row in self._rows():
            types.add_row(row.columns)
        # A column that is null in all of the sampled files has its type from img2dataset's table.
        schema_names = dict.fromkeys(self._shard_schema.names)
        types.add_schema(self._shard_schema, schema_names.keys() - self._split_document(schema_names)[1].keys())
        documents = [row.json_file for row in self._rows() if row.json_file]
        step = -(-len(documents) // _SAMPLED_DOCUMENTS) or 1
        for document in storage.map_urls(_read_document, [storage.join(self.base, name)
                                                          for name in documents[::step]]):
            types.add_row(self._split_document((document or ({}, []))[0])[1])
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
        """The bytes of a row's image; its text and its JSON are added to the row. BadImage if it is gone."""
        if row.missing:
            raise BadImage(row.reason or "picture_missing", row.missing)
        try:
            for name in filter(None, (row.caption_file, row.later_caption_file)):
                if not row.caption:
                    row.caption, remarks = _read_text(storage.join(self.base, name))
                    row.remarks = [*row.remarks, *remarks]
            if row.json_file:
                self._add_document(row)
            if not row.caption and (row.caption_file or row.json_file) and "json_unreadable" not in row.remarks:
                row.remarks = [*row.remarks, "caption_missing"]
            return storage.read_at_most(storage.join(self.base, row.name), MOST_SAMPLE_BYTES)
        except storage.FileTooLarge:
            raise BadImage("too_large", f"more than {MOST_SAMPLE_BYTES:,} bytes") from None
        except FileNotFoundError:
            raise BadImage("picture_missing", "gone since it was listed") from None

    def columns_of(self, row: Row) -> Mapping[str, Any]:
        if not row.json_file or row.missing:
            return row.columns
        with_document = copy.copy(row)
        with contextlib.suppress(FileNotFoundError):
            self._add_document(with_document)
        return with_document.columns

    def _add_document(self, row: Row) -> None:
        """Add what the JSON beside an image says. The table of captions and the text beside the image come first."""
        document = _read_document(storage.join(self.base, row.json_file))
        if document is None:
            row.remarks = [*row.remarks, "json_unreadable"]
            return
        cells, remarks = document
        caption, columns = self._split_document(cells)
        row.caption = row.caption or caption
        row.columns, row.remarks = columns | row.columns, [*row.remarks, *remarks]

    def _split_document(self, document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The caption in a JSON file beside an image, and the other cells."""
        wanted = [self.config.caption_column] if self.config.caption_column else find_caption_columns(document)
        caption = next((name for name in wanted if document.get(name)), next(iter(wanted), ""))
        others = {name: cell for name, cell in document.items() if name != caption or is_more_than_caption(name)}
        return cell_text(cell_at(document, caption)), others

    def _rows(self) -> list[Row]:
        if self._listed_rows is None:
            self._listed_rows = list(self._list())
            if not self._listed_rows:
                others = f"; it has {count_text(self.ignored)}" if self.ignored else ""
                raise ValueError(f"no images in {self.config.source[0]}{others}\nhint: files ending in "
                                 f"{', '.join(SUFFIXES)} are looked for, in folders below it too")
        return self._listed_rows

    def _list(self) -> Iterator[Row]:
        try:
            files = sort_files(self._listed if self._listed is not None else storage.walk(self.base))
        except FileNotFoundError:
            hint = ("\nhint: in a source of images only *, ** and ? are patterns; name the folder above"
                    if re.search(r"[\[{]", self.base) else "")
            raise ValueError(f"there is no folder {self.base}{hint}") from None
        self._listed = None
        images = sorted(name for name in files.images if self.pattern.fullmatch(name))
        self._layout = find_folder_layout(images)
        if self._layout:
            _log.info("%s looks like %s; taking %s from %s", self.base, self._layout.name,
                      ", ".join(self._layout.columns), self._layout.path)
            if strangers := [name for name in images if not fits_layout(self._layout, name)]:
                _log.warning("%s: %d images are in no folder of %s, as %s", self.base, len(strangers),
                             self._layout.name, strangers[0])
        by_name: dict[str, str] = {}
        for name in images:
            # macOS spells accents in two characters where a captions file has one: compare both as one,
            # unless both spellings are there as two files.
            usual = usual_accents(name)
            by_name[name if (usual != name and usual in files.images) or usual in by_name else usual] = name
        captions = self._captions(files, set(by_name))
        self._report(files)
        listed = {name: row for name, row in captions.rows.items() if name in by_name or self.pattern.fullmatch(name)}
        if gone := sorted(name for name in listed if name not in by_name):
            tables = ", ".join([self.config.captions] if self.config.captions else files.tables)
            _log.warning("%s: %d images that %s names are not in the folder, the first is %s", self.base, len(gone),
                         tables, gone[0])
        wanted = list(listed) if self.config.only_captioned else [
            *sorted(by_name), *sorted(listed.keys() - by_name.keys())]
        for number, name in enumerate(wanted):
            row = self._row(number, name, by_name.get(name), listed.get(name), files, name in captions.repeated,
                            bool(listed))
            row.remarks += captions.remarks.get(name, [])
            yield row
        for number, (place, read) in enumerate(captions.bad_rows.items(), len(wanted)):
            yield Row(number, place, remarks=list(read.remarks), missing=read.problem, reason=BAD_ROW)

    def _row(self, number: int, name: str, file: str | None, listed: dict[str, Any] | None, files: FolderFiles,
             repeated: bool, any_listed: bool) -> Row:
        """The row of an image; `listed` is what the tables of captions say of it."""
        columns = dict(listed or {})
        caption = columns.pop("caption", None) or ""
        remarks = ["caption_twice"] if repeated else []
        stem = stem_of(file or name)
        texts = [] if caption else files.texts.get(stem, [])
        caption_file, later_caption_file = [*texts, "", ""][:2]
        json_file = files.documents.get(file or name) or files.documents.get(stem, "")
        if listed is None and not caption_file and not json_file and (any_listed or files.has_texts):
            remarks.append("caption_missing")
        elif listed is not None and "caption" in listed and not (caption.strip() or caption_file or json_file):
            remarks.append(_EMPTY_CAPTION)
        if self._layout and file and not json_file and not fits_layout(self._layout, file):
            remarks.append("class_missing")
        elif self._layout and file and not json_file:
            derived = {key: cell for key, cell in folder_cells(self._layout, file).items() if key not in columns}
            self._layout_columns[number] = set(derived)
            columns |= derived
        problem = NOT_IN_FOLDER if file is None else "a link that leads nowhere" if files.images[file] is None else ""
        return Row(number, file or name, caption, columns, remarks=remarks, caption_file=caption_file,
                   later_caption_file=later_caption_file, json_file=json_file, missing=problem)

    def _captions(self, files: FolderFiles, names: set[str]) -> CaptionTables:
        """The captions of all tables: that of the settings, or those in the folder."""
        captions, by_stem, column = CaptionTables(), names_by_stem(names), self.config.caption_column
        if self.config.captions:
            captions.add_table(self.config.captions, "", names, by_stem, column)
            files.ignored.update(suffix_of(name) for name in files.tables)
            return captions
        if not files.tables and self.config.only_captioned:
            raise ValueError(f"only_captioned, but {self.base} has no captions\nhint: --captions FILE")
        for name in files.tables:
            captions.add_table(storage.join(self.base, name), name.rpartition("/")[0], names, by_stem, column)
        return captions

    def _report(self, files: FolderFiles) -> None:
        """Count what gives no row, and say so once."""
        self.ignored = files.ignored
        addresses = [storage.join(self.base, name) for name in files.shard_tables]
        if addresses and img2dataset.is_output((schema := read_schema(addresses[0])).names):
            self._shard_schema = schema
        self.earlier_failures = sum(storage.map_urls(img2dataset.count_failures, addresses))
        if self.earlier_failures:
            _log.info("%s: %d rows of img2dataset have no image, because it could not get them", self.base,
                      self.earlier_failures)
        if files.ignored:
            _report_ignored(self.base, count_text(files.ignored))


@lru_cache(64)  # one line for all datasets of the demo, which have one source
def _report_ignored(folder: str, counts: str) -> None:
    _log.info("%s: files that are ignored: %s", folder, counts)


_EMPTY_CAPTION = "caption_missing: the table has an empty text"


def _read_text(url: str) -> tuple[str, list[str]]:
    """The text beside an image, and remarks on it; "" if it is too long."""
    try:
        return decode_text(storage.read_at_most(url, MOST_LETTERS), "caption")
    except storage.FileTooLarge:
        return "", [f"cell_changed: caption: left out, for its file has more than {MOST_LETTERS:,} bytes"]


def _read_document(url: str) -> tuple[dict[str, Any], list[str]] | None:
    """The JSON object beside an image, as cells, and remarks on these; None if it is none, or is too large."""
    decoder = JsonDecoder()
    try:
        text = storage.read_at_most(url, MOST_JSON_BYTES).decode("utf-8-sig")
        cells = decoder.parse_row(text)
        return json_cells(cells), decoder.take_remarks(cells, text)
    except ValueError:
        return None


def split_pattern(address: str) -> tuple[str, re.Pattern[str]]:
    """A folder, and the pattern that names below it must match: * stays in a folder, ** does not."""
    if "*" not in address and "?" not in address:
        if address.lower().endswith(SUFFIXES) and storage.is_file(address):
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
