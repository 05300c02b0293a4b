"""Which column of a list is what, and its rows as rows of a source."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from pipeline.layouts.column_paths import cell_at, find_roots
from pipeline.layouts.known import Layout, find_layout
from pipeline.rows import img2dataset
from pipeline.rows.column_names import find_caption_columns, find_columns, is_more_than_caption
from pipeline.rows.rows import BAD_ROW, Row, json_cells
from pipeline.tables.arrow_cells import is_nested, is_text, storage_type, stored_columns
from pipeline.tables.cells import TableRow, cell_text, leave_out_long_texts
from pipeline.tables.delimited import check_delimiter
from pipeline.tables.image_cells import can_hold_images, is_data_url, read_data_url, read_image_cell

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes", "images")
HASH_COLUMNS = ("original_sha256", "sha256", "md5")
FAILED_BEFORE = "failed_before"
"""The reason of rows that img2dataset could not get, and that are not fetched again."""
_SETTINGS = ("url_column", "image_column", "caption_column", "hash_column")
_DIGITS = (32, 40, 64, 128)  # of md5, sha1, sha256 and sha512 in hexadecimal
_HASH = re.compile("[0-9a-fA-F]*")


@dataclass(frozen=True)
class Columns:
    """Which column of a file is what."""

    image: str
    """A column; URLs and captions may be expressions of layouts/column_paths.py."""
    kind: Literal["url", "bytes"]
    caption: str
    digest: str
    whole: frozenset[str] = frozenset()
    """Columns for image, URL or caption whose cells are lists or objects. The first text is used, and all is stored."""
    others: tuple[str, ...] = ()
    """The columns that hold neither the image nor its hash."""
    status: str = ""
    """The column that tells of rows without an image."""
    caption_missing: bool = False
    """Whether other files of the list have captions, and this one has none."""
    caption_expected: bool = False
    """Whether a setting names the caption, or a path or a template builds it: rows without one are noted."""
    layout: Layout | None = None
    added: tuple[tuple[str, str], ...] = ()
    """Columns that the layout adds to those of the file: (name, expression)."""

    @cached_property  # used for each row
    def not_stored(self) -> set[str]:
        """The columns whose cells are used, and not stored under their names."""
        image = {self.image} if self.kind == "bytes" or self.image not in self.whole else set()
        is_stored = self.caption in self.whole or is_more_than_caption(self.caption)
        return image if is_stored else {*image, self.caption} - {""}


def choose_columns(schema: pa.Schema, address: str, config: ShardConfig, first: Columns | None = None,
                   text_kinds: Mapping[str, str] | None = None) -> Columns:
    """Which column is what, by the settings or the usual names.

    first: the columns of the first file of the list. text_kinds: columns of text that hold images in base64 (bytes) or
    their URLs (url).
    """
    text_kinds = text_kinds or {}
    names = [column.name for column in stored_columns(schema, schema.names)[0]]
    types = dict(zip(names, schema.types, strict=True))
    layout = find_layout(names) or Layout("", ())
    _check_settings(config, names, address, is_first=first is None)
    image = config.image_column or next(
        (name for name in IMAGE_COLUMNS if name in types and (
            can_hold_images(types[name]) or text_kinds.get(name) == "bytes")), "")
    # Images in the file need no download.
    url = config.url_column or ("" if image else _choose_url(layout, types, text_kinds))
    if not (url or image):
        check_delimiter(names, address)
        raise ValueError(_no_image_column(names, address, layout))
    if not url and not (can_hold_images(types[image]) or is_text(storage_type(types[image]))):
        raise ValueError(f"{address}: the column {image} holds {types[image]}, not bytes of images")
    kind: Literal["url", "bytes"] = "url" if url else "bytes"
    if first and kind != first.kind:
        raise ValueError(f"{address} has images as {kind} ({url or image}), and the first file of the list as "
                         f"{first.kind} ({first.image})\nhint: make a dataset of each")
    caption = config.caption_column or _choose_caption(layout, types)
    caption = caption if find_roots(caption, types) else ""
    is_output = img2dataset.is_output(types)
    # The hashes of img2dataset are those of its downloads, and it encodes images again.
    digest = config.hash_column or ("" if is_output and kind == "bytes" else
                                    next((name for name in HASH_COLUMNS if name in types),
                                         layout.hash if url == layout.url else ""))
    added = tuple((name, path) for name, path in layout.columns if name not in types and find_roots(path, types))
    roots = {root for path in (url, caption, *(path for _, path in added)) if path for root in find_roots(path, types)}
    whole = {name for name in roots if is_nested(types[name])} | ({image} if not url else set())
    others = tuple(name for name in types if name not in {url, image, digest})
    return Columns(url or image, kind, caption, digest if digest in types else "", frozenset(whole), others,
                   img2dataset.STATUS if is_output and not config.fetch_failed else "",
                   bool(first and first.caption and not caption),
                   bool(caption) and (bool(config.caption_column) or caption not in types),
                   layout if layout.name else None, added)


def _check_settings(config: ShardConfig, names: list[str], address: str, *, is_first: bool) -> None:
    """ValueError if a setting names a column that a file does not have. Later files may lack captions and hashes."""
    for setting in _SETTINGS:
        wanted = getattr(config, setting)
        optional = not is_first and setting in {"caption_column", "hash_column"}
        if not wanted or optional or (setting == "hash_column" and wanted == "none"):
            continue
        if wanted not in names and (setting in {"image_column", "hash_column"} or not find_roots(wanted, names)):
            raise ValueError(f"{address} has no column {wanted} ({setting})\nhint: it has {', '.join(names)}")


def _choose_url(layout: Layout, types: Mapping[str, pa.DataType], text_kinds: Mapping[str, str]) -> str:
    """The column or the expression for URLs, "" if there is none."""
    usual = next((name for name in (*find_columns(types, URL_COLUMNS), *text_kinds) if name in types
                  and text_kinds.get(name) != "bytes"), "")
    known = layout.url if layout.url and find_roots(layout.url, types) else ""
    return known or usual if layout.url_first else usual or known


def _choose_caption(layout: Layout, types: Mapping[str, pa.DataType]) -> str:
    """The usual column for captions, and after it the path of a layout, whose records may lack that column."""
    usual = next(iter(find_caption_columns(types)), "")
    is_path = layout.caption and "{" not in layout.caption and layout.caption not in types
    return f"{usual};{layout.caption}" if usual and is_path else usual or layout.caption


def text_candidates(schema: pa.Schema) -> list[str]:
    """Columns of text with the usual name of images, which may hold these in base64 or their URLs."""
    if any(name in IMAGE_COLUMNS and can_hold_images(kind) for name, kind in zip(schema.names, schema.types,
                                                                                 strict=True)):
        return []
    return [name for name in IMAGE_COLUMNS if schema.names.count(name) == 1
            and is_text(storage_type(schema.field(name).type))]


def _no_image_column(names: list[str], address: str, layout: Layout) -> str:
    if layout.no_url:
        return f"{address} looks like {layout.name}: {layout.no_url}"
    if any("://" in name for name in names):
        columns = [f"column{number}" for number in range(1, len(names) + 1)]
        url = next(number for number, name in enumerate(names) if "://" in name)
        columns[url] = "url"
        if len(columns) > 1:
            columns[0 if url else 1] = "caption"
        return (f"{address} has no header: the first line is {', '.join(names)[:200]}\n"
                f"hint: --columns {','.join(columns)} names the columns, in their order")
    return (f"{address} has the columns {', '.join(names)}; wanted is one of {', '.join(URL_COLUMNS)}, or images as "
            f"bytes\nhint: --url-column, or --image-column for one with bytes")


def make_row(number: int, read: TableRow, columns: Columns) -> Row:
    """A row of a file as a row of the source."""
    if read.problem:
        return Row(number, read.place, missing=read.problem, remarks=list(read.remarks), reason=BAD_ROW)
    cells, remarks = read.cells, list(read.remarks)
    failure = img2dataset.earlier_failure(cells) if columns.status else ""
    cell = cell_at(cells, columns.image)
    caption_cell = cell_at(cells, columns.caption) if columns.caption else None  # pandas writes a column named ""
    added = {name: cell_text(cell_at(cells, path)) or None for name, path in columns.added if name not in cells}
    # Objects of JSON may lack the column.
    is_expected = columns.caption_expected or (bool(columns.caption) and columns.caption not in cells)
    for name in columns.not_stored:
        cells.pop(name, None)
    caption = cell_text(caption_cell)
    if columns.caption_missing or (is_expected and not caption.strip()):
        remarks.append("caption_missing")
    digest, unreadable = _parse_digest(cells.get(columns.digest)) if columns.digest else ("", [])
    stored = json_cells(cells | added)
    texts = {"caption": caption}
    remarks += [*unreadable, *leave_out_long_texts(texts), *leave_out_long_texts(stored)]
    row = Row(number, "", texts["caption"] or "", stored, digest, remarks)
    if columns.kind == "url":
        row.name = cell_text(cell).strip()
        row.missing = "" if row.name else "the list has no address here"
        if is_data_url(row.name):
            image = read_data_url(row.name)
            row.name, row.data, row.missing = image.path or f"row {number}", image.data, image.problem
        if failure:
            row.missing, row.reason = failure, FAILED_BEFORE
        if isinstance(cell, list) and len(cell) > 1:
            row.remarks.append(f"first_of_several: {columns.image}: the first of {len(cell)} is taken")
        return row
    if isinstance(cell, list) and len(cell) > 1 and not isinstance(cell[0], int):
        row.remarks.append(f"first_of_several: {columns.image}: the first of {len(cell)} is taken")
    image = read_image_cell(cell)
    if image.problem:
        row.remarks.append(f"cell_changed: {columns.image}: {image.problem}")
    row.name = (image.path or cell_text(cells.get("url")) or cell_text(cells.get("key")) or cell_text(cells.get("id"))
                or f"row {number}")
    row.data, row.missing = image.data, "" if image.data is not None else "the table has no bytes here"
    if failure and image.data is None:
        row.missing, row.reason = failure, FAILED_BEFORE
    return row


def _parse_digest(cell: Any) -> tuple[str, list[str]]:
    """A hash in hexadecimal, "" if there is none; and remarks. OpenImages has hashes in base64."""
    hexadecimal = cell_text(cell).strip()
    if len(hexadecimal) in _DIGITS and _HASH.fullmatch(hexadecimal):
        return hexadecimal.lower(), []
    if isinstance(cell, bytes) and 2 * len(cell) in _DIGITS:
        return cell.hex(), []
    if hexadecimal.endswith("="):
        with contextlib.suppress(binascii.Error, ValueError):
            if 2 * len(data := base64.b64decode(hexadecimal, validate=True)) in _DIGITS:
                return data.hex(), []
    return "", ["hash_unreadable"] if hexadecimal else []


def describe_layout(columns: Columns) -> str:
    """One line on a known layout and what is taken from it; "" for other tables."""
    if not columns.layout:
        return ""
    choices = [f"{columns.image} as {'URL' if columns.kind == 'url' else 'image'}",
             f"{columns.caption} as caption" if columns.caption else "no caption",
             *([f"{columns.digest} as hash"] if columns.digest else []),
             *(f"{path} as {name}" for name, path in columns.added)]
    return f"looks like {columns.layout.name}; taking {', '.join(choices)}"
