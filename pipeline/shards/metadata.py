"""Columns of the parquet file beside each tar, and the status of each row."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables.cells import stored_text

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

# img2dataset's, and `source_row`: the place of the row in the source.
COLUMNS = {"caption": pa.string(), "url": pa.string(), "key": pa.string(), "status": pa.string(),
           "error_message": pa.string(), "width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(),
           "original_height": pa.int32(), "exif": pa.string(), "sha256": pa.string(), "original_sha256": pa.string(),
           "source_row": pa.int64()}
PATCH_COLUMNS = {"patch_left": pa.int32(), "patch_top": pa.int32(), "patch_short_side": pa.int32()}
HASH_COLUMNS = {"pixel_sha256": pa.string(), "phash": pa.uint64(), "mean_colour": pa.list_(pa.uint8())}
IMAGE_COLUMNS = {"image_offset": pa.int64(), "image_bytes": pa.int64()}
"""The place of a sample's encoded image in the tar, in bytes. Parquet files of version 0.1 do not have them."""
SUCCESS, NOT_FETCHED, NOT_USABLE = "success", "failed_to_download", "failed_to_resize"
FORGOTTEN, MISSING = "forgotten", "missing"
"""Statuses that only the listing of a version has: on the takedown list; named in the captions, not in the folder."""
_KINDS = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), "bytes": pa.binary()}


def column_types(config: "ShardConfig") -> dict[str, pa.DataType]:
    """The types of the columns that the transform of images gives with these settings."""
    types = dict(COLUMNS)
    if config.patches:
        types |= PATCH_COLUMNS
    if config.duplicates != "keep":
        names = ("pixel_sha256",) if config.duplicates == "exact" else tuple(HASH_COLUMNS)
        types |= {name: HASH_COLUMNS[name] for name in names}
    return types


def reserved_names(config: "ShardConfig") -> set[str]:
    """The names that columns of a source cannot have in a shard with these settings."""
    return {*column_types(config), *IMAGE_COLUMNS}


def stored_names(names: Iterable[str], reserved: Collection[str]) -> dict[str, str]:
    """The names under which columns of a source are stored: those with a `reserved` name get `source_` before it."""
    own = list(names)
    stored = {}
    for name in own:
        other = name
        while other in reserved or (other != name and other in own):
            other = f"source_{other}"
        stored[name] = other
    return stored


def metadata_table(metas: list[dict[str, Any]], types: dict[str, pa.DataType], known: Mapping[str, str]) -> pa.Table:
    """Metadata as a table: the source's own columns first, of the types that are known, then those of `types`."""
    extra = sorted({*known, *(name for meta in metas for name in meta)} - set(types))
    columns = {name: _column([meta.get(name) for meta in metas], known.get(name)) for name in extra}
    for name, kind in types.items():
        columns[name] = pa.array([meta.get(name) for meta in metas], kind)
    return pa.table(columns)


def changed_types(table: pa.Table, known: Mapping[str, str], own: Mapping[str, pa.DataType]) -> list[str]:
    """A text for each column, not of `own`, whose cells do not fit into the type of other shards."""
    kinds = {name: _KINDS.get(kind, pa.string()) for name, kind in known.items() if name not in own}
    return [f"{name}: {table.schema.field(name).type} in this shard, {kind} in others"
            for name, kind in kinds.items() if name in table.schema.names and table.schema.field(name).type != kind]


def add_image_positions(table: pa.Table, positions: np.ndarray) -> pa.Table:
    """Metadata with `IMAGE_COLUMNS`. `positions`: the offset and length of each sample's image, (N, 2) int64."""
    succeeded = pc.equal(table["status"], SUCCESS).to_numpy()
    assert succeeded.sum() == len(positions), (succeeded.sum(), len(positions))
    cells = np.zeros((len(succeeded), 2), np.int64)
    cells[succeeded] = positions
    table = table.drop_columns([name for name in IMAGE_COLUMNS if name in table.column_names])
    for name, column in zip(IMAGE_COLUMNS, cells.T, strict=True):
        table = table.append_column(name, pa.array(column, IMAGE_COLUMNS[name], mask=~succeeded))
    return table


def _column(cells: list[Any], kind: str | None) -> pa.Array:
    """Cells of a type, as text if they do not fit."""
    cell_types = {type(cell) for cell in cells} - {type(None)}
    # Arrow takes 0.5 for the integer 0, and true for the float 1.
    if kind == "int64" and float in cell_types:
        kind = "double"
    if kind == "double" and bool in cell_types:
        kind = "string"
    if kind != "string":
        try:
            column = pa.array(cells, _KINDS.get(kind or ""))
            if not pa.types.is_null(column.type):
                return column
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # cells of several types, or numbers too large
            pass
    texts = [cell if cell is None or isinstance(cell, str) else stored_text(cell) for cell in cells]
    return pa.array(texts, pa.string())
