"""Tables that describe the images or tars beside them, and are no source themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import pyarrow as pa

from pipeline.rows import img2dataset
from pipeline.rows.column_names import FILE_COLUMNS, find_columns
from pipeline.sources.folder_files import CAPTION_FILES, METADATA_FILES, stem_of
from pipeline.sources.list_columns import IMAGE_COLUMNS, URL_COLUMNS
from pipeline.sources.source import TARS
from pipeline.tables.image_cells import can_hold_images
from pipeline.tables.names import is_parquet
from pipeline.tables.parquet_tables import read_schema
from pipeline.tables.text_tables import read_rows

_FIRST_ROWS = 100


def find_companions(kinds: Mapping[str, list[str]], stage_folders: set[str], address_of: Callable[[str], str]
                    ) -> set[str]:
    """The lists that only describe the images or tars beside them.

    kinds: names of files by kind. stage_folders: folders that this program wrote. Tables are opened, because a table
    with URLs or images is a corpus. Only one table is opened beside tars, and one beside the output of img2dataset.
    """
    tars = {name[:-len(suffix)] for name in kinds.get("tars", ()) for suffix in TARS if name.lower().endswith(suffix)}
    folders = {folder for name in kinds.get("pictures", ()) for folder in folders_above(name)}
    found = {name for name in kinds["list"] if not stage_folders.isdisjoint([*folders_above(name), ""])}
    # img2dataset writes 00000.parquet beside 00000.tar, or beside the folder 00000.
    beside_tars = [name for name in kinds["list"] if stem_of(name) in tars]
    beside_folders = [name for name in kinds["list"] if f"{stem_of(name)}/" in folders]
    if beside_tars and not ((schema := _schema(address_of(beside_tars[0]))) and _has_images(schema)):
        found.update(beside_tars)
    if beside_folders and (schema := _schema(address_of(beside_folders[0]))) and img2dataset.is_output(
            schema.names) and not _has_images(schema):
        found.update(beside_folders)
    if folders:
        found.update(name for name in kinds["list"] if name.rpartition("/")[2] in {*CAPTION_FILES, *METADATA_FILES}
                     and not _is_corpus(address_of(name)))
    return found


def folders_above(name: str) -> list[str]:
    """The folders that a relative name lies in, each with a slash at its end; [""] at the top."""
    return [name[:position + 1] for position, letter in enumerate(name) if letter == "/"] or [""]


def _schema(address: str) -> pa.Schema | None:
    """The schema of a parquet file; None for other tables, and for damaged ones, which their reader names."""
    try:
        return read_schema(address) if is_parquet(address) else None
    except (ValueError, OSError):
        return None


def _has_images(schema: pa.Schema) -> bool:
    return any(can_hold_images(schema.field(name).type) for name in find_columns(schema.names, IMAGE_COLUMNS))


def _is_corpus(address: str) -> bool:
    """Whether a table has images, or URLs and no names of files. A table that cannot be read is none."""
    if is_parquet(address):
        schema = _schema(address)
        return schema is not None and (_has_images(schema) or _has_urls_only(schema.names))
    try:
        rows = list(itertools.islice(read_rows(address), _FIRST_ROWS))
    except (ValueError, OSError):
        return False
    return _has_urls_only(dict.fromkeys(name for row in rows for name in row.cells))


def _has_urls_only(names: Iterable[str]) -> bool:
    return bool(find_columns(names, URL_COLUMNS)) and not find_columns(names, FILE_COLUMNS)
