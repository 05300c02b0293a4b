"""Cells of tables that hold images."""

from __future__ import annotations

import base64
import binascii
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.tables.arrow_cells import is_binary, is_text, storage_type


class ImageCell(NamedTuple):
    """The bytes of an image, its path, and how the bytes had to be read."""

    data: bytes | None
    path: str = ""
    problem: str = ""


def can_hold_images(kind: pa.DataType) -> bool:
    """Whether cells of a type can be images: bytes, lists of numbers, or structs with a field `bytes` of these."""
    kind = storage_type(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = storage_type(kind.field("bytes").type)
        return _is_bytes(inner) or is_text(inner)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    is_list = any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
                                            pa.types.is_list_view, pa.types.is_large_list_view))
    return is_binary(kind) or (is_list and pa.types.is_integer(storage_type(kind.value_type)))


def read_image_cell(cell: Any) -> ImageCell:
    """The image of a cell: bytes, a list of numbers from 0 to 255, base64 text, or an object with one of these."""
    if isinstance(cell, dict):
        inner = read_image_cell(cell.get("bytes"))
        path = cell.get("path")
        return inner._replace(path=path if isinstance(path, str) else "")
    if cell is None or isinstance(cell, bytes):
        return ImageCell(cell)
    if isinstance(cell, list):
        try:
            return ImageCell(bytes(cell), problem="a list of numbers is read as bytes")
        except (TypeError, ValueError):
            return ImageCell(None, problem="the numbers of a list are no bytes")
    try:
        return ImageCell(base64.b64decode("".join(str(cell).split()), validate=True), problem="base64 is read as bytes")
    except (binascii.Error, ValueError):
        return ImageCell(None, problem="the text is no base64")
