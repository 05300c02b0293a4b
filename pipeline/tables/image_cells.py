"""Cells of tables that hold images."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from pipeline.tables.arrow_cells import is_binary, is_text, storage_type

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\xff\x0a",
               b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")
_SHOWN = 48  # characters of base64 that tell whether it is an image


class ImageCell(NamedTuple):
    """The bytes of an image, its path, and how the bytes had to be read."""

    data: bytes | None
    path: str = ""
    problem: str = ""


def can_hold_images(kind: pa.DataType) -> bool:
    """Whether cells of a type can be images: bytes, lists of numbers, structs with `bytes`, or lists of these."""
    kind = storage_type(kind)
    if _is_list(kind) and not pa.types.is_integer(storage_type(kind.value_type)):
        return can_hold_images(kind.value_type)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = storage_type(kind.field("bytes").type)
        return _is_bytes(inner) or is_text(inner)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return is_binary(kind) or (_is_list(kind) and pa.types.is_integer(storage_type(kind.value_type)))


def _is_list(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
                                         pa.types.is_list_view, pa.types.is_large_list_view))


def read_image_cell(cell: Any) -> ImageCell:
    """The image of a cell: bytes, numbers from 0 to 255, base64, a `data:` URL, or an object or list with one."""
    if isinstance(cell, dict):
        inner = read_image_cell(cell.get("bytes"))
        path = cell.get("path")
        return inner._replace(path=path if isinstance(path, str) else "")
    if cell is None or isinstance(cell, bytes):
        return ImageCell(cell)
    if isinstance(cell, list) and not all(isinstance(number, int) for number in cell):
        return next((image for image in map(read_image_cell, cell) if image.data is not None), ImageCell(None))
    if isinstance(cell, list):
        if not cell:
            return ImageCell(None)
        try:
            return ImageCell(bytes(cell), problem="a list of numbers is read as bytes")
        except (TypeError, ValueError):
            return ImageCell(None, problem="the numbers of a list are no bytes")
    if is_data_url(str(cell)):
        return read_data_url(str(cell))
    try:
        return ImageCell(base64.b64decode("".join(str(cell).split()), validate=True), problem="base64 is read as bytes")
    except (binascii.Error, ValueError):
        return ImageCell(None, problem="the text is no base64")


def is_data_url(text: str) -> bool:
    """Whether a URL holds its content itself."""
    return text[:5].lower() == "data:"


def read_data_url(url: str) -> ImageCell:
    """The content of a `data:` URL (RFC 2397). Its path is a short name: the media type and a hash of the content."""
    head, comma, text = url.partition(",")
    media_type, *parameters = head[5:].split(";")
    try:
        data = unquote_to_bytes(text)
        if "base64" in (parameter.strip().lower() for parameter in parameters):
            data = base64.b64decode(b"".join(data.split()) + b"=" * (-len(b"".join(data.split())) % 4), validate=True)
    except (binascii.Error, ValueError):
        return ImageCell(None, problem="the data: URL is no base64")
    if not comma or not data:
        return ImageCell(None, problem="the data: URL has no content")
    return ImageCell(data, f"data:{media_type};sha256={hashlib.sha256(data).hexdigest()[:16]}")


def text_kind(text: str) -> Literal["url", "bytes", ""]:
    """Whether text is the URL of an image, or an image in base64 or in a `data:` URL; "" if it is neither."""
    text = text.strip()
    if text.lower().startswith(("http://", "https://")):
        return "url"
    if is_data_url(text):
        return "bytes"
    try:
        start = base64.b64decode("".join(text[:2 * _SHOWN].split())[:_SHOWN], validate=True)
    except (binascii.Error, ValueError):
        return ""
    return "bytes" if start.startswith(_SIGNATURES) or start[4:8] == b"ftyp" else ""
