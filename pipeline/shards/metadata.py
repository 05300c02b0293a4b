"""Columns of the parquet file beside each tar, and the status of each row."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

# img2dataset's, and `source_row`: the place of the row in the source.
COLUMNS = {"caption": pa.string(), "url": pa.string(), "key": pa.string(), "status": pa.string(),
           "error_message": pa.string(), "width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(),
           "original_height": pa.int32(), "exif": pa.string(), "sha256": pa.string(), "original_sha256": pa.string(),
           "source_row": pa.int64()}
PATCH_COLUMNS = {"patch_left": pa.int32(), "patch_top": pa.int32(), "patch_short_side": pa.int32()}
HASH_COLUMNS = {"pixel_sha256": pa.string(), "phash": pa.uint64(), "mean_colour": pa.list_(pa.uint8())}
SUCCESS, NOT_FETCHED, NOT_USABLE = "success", "failed_to_download", "failed_to_resize"
FORGOTTEN = "forgotten"
_KINDS = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}


def metadata_table(metas: list[dict[str, Any]], types: dict[str, pa.DataType], known: Mapping[str, str]) -> pa.Table:
    """Metadata as a table: the source's own columns first, of the types that are known, then those of `types`."""
    extra = sorted({*known, *(name for meta in metas for name in meta)} - set(types))
    columns = {name: _column([meta.get(name) for meta in metas], known.get(name)) for name in extra}
    for name, kind in types.items():
        columns[name] = pa.array([meta.get(name) for meta in metas], kind)
    return pa.table(columns)


def _column(cells: list[Any], kind: str | None) -> pa.Array:
    """Cells of a type, as text if they do not fit."""
    if kind != "string":
        try:
            column = pa.array(cells, _KINDS.get(kind or ""))
            if not pa.types.is_null(column.type):
                return column
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # cells of several types, or numbers too large
            pass
    return pa.array([cell if cell is None or isinstance(cell, str) else str(cell) for cell in cells], pa.string())
