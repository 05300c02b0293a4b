"""Transform one row of a source into its samples."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.media.decode import decode, read_exif
from pipeline.media.hashes import perceptual_hash, pixel_hash
from pipeline.media.resize import cut_patches, encode, resize
from pipeline.media.types import BadImage, Pixels, size_of
from pipeline.rows.rows import Row, redact_cells, split_remark
from pipeline.shards.metadata import (
    COLUMNS,
    FORGOTTEN,
    NOT_FETCHED,
    NOT_USABLE,
    SUCCESS,
    reserved_names,
    stored_names,
)
from pipeline.stages.types import Entry

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the length in hexadecimal digits


class NotFetched(BadImage):
    """An image whose bytes could not be read or downloaded."""


@dataclass
class RowResult:
    """The samples of a row: their metadata, encoded images, and lines for the ledger.

    A row without a sample has no images and one line of metadata, which has the reason.
    """

    metas: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def transform_row(config: "ShardConfig", row: Row, keys: list[str], read: Callable[[Row], bytes] | None = None,
                  refused: frozenset[str] = frozenset()) -> RowResult:
    """The samples of a row, with a key for each, or the reason why it has none.

    `read` gives the image's bytes if the row does not have them. Bytes whose sha256 is `refused` give no sample.
    """
    sha256, reserved = "", reserved_names(config)
    try:
        data = _encoded_image(row, read)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in refused:
            raise BadImage(FORGOTTEN, "")
        _check_hash(row.digest, data, sha256)
        patched = config.patches > 0
        image = decode(data, config.max_pixels, at_least=config.patch_side if patched else config.image_size,
                       how="keep_ratio" if patched else config.resize, min_size=config.min_size,
                       max_aspect=config.max_aspect)
        meta = bare_row(row, reserved) | {
            "status": SUCCESS, "original_width": image.width, "original_height": image.height,
            "exif": json.dumps(read_exif(data)) if config.exif else None, "original_sha256": sha256}
        result = RowResult(entries=[Entry(source_name(row), reason, detail, kept=True)
                                    for reason, detail in [*image.remarks, *map(split_remark, row.remarks)]])
        resized = resize(image, config.patch_side if patched else config.image_size,
                         "keep_ratio" if patched else config.resize, only_if_bigger=config.only_if_bigger,
                         max_aspect=config.max_aspect)
        if patched:
            patches = cut_patches(resized, config.image_size, config.patches, config.seed, row.name)
            for (x, y, patch), key in zip(patches, keys, strict=True):
                position = {"patch_left": x, "patch_top": y, "patch_short_side": min(size_of(resized))}
                _add_sample(result, config, meta | position, key, patch,
                            encode(patch, config.format, config.quality))
        else:
            stored_format = {"jpg": "jpeg"}.get(config.format, config.format)
            unchanged = resized is image.image and image.plain and image.format == stored_format
            _add_sample(result, config, meta, keys[0], resized,
                        data if unchanged else encode(resized, config.format, config.quality))
    except BadImage as bad:
        result = failed_row(row, keys[0], bad, reserved, sha256 if bad.reason != FORGOTTEN else "")
    return result


def _encoded_image(row: Row, read: Callable[[Row], bytes] | None) -> bytes:
    if row.data is not None:
        return row.data
    if read is None:
        raise NotFetched(row.reason or "picture_missing", row.missing)
    try:
        return read(row)
    except BadImage as bad:
        raise NotFetched(bad.reason, bad.detail) from None


def _add_sample(result: RowResult, config: "ShardConfig", meta: dict[str, Any], key: str, image: Pixels,
                data: bytes) -> None:
    width, height = size_of(image)
    meta = meta | {"key": key, "width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}
    if config.duplicates != "keep":
        meta["pixel_sha256"] = pixel_hash(image)
        if config.duplicates == "near":
            meta["phash"], meta["mean_colour"] = perceptual_hash(image)
    result.metas.append(meta)
    result.images.append(data)


def failed_row(row: Row, key: str, bad: BadImage, reserved: Collection[str], sha256: str = "") -> RowResult:
    """The result of a row that gives no sample. `sha256` is that of its bytes, if they were read."""
    status = NOT_FETCHED if isinstance(bad, NotFetched) else NOT_USABLE
    detail = storage.redact_credentials(bad.detail)
    name = source_name(row) or f"row {row.number}"
    return RowResult([bare_row(row, reserved) | {
        "key": key, "status": status, "error_message": f"{bad.reason}: {detail}", "original_sha256": sha256 or None}],
                     entries=[Entry(name, bad.reason, detail),
                              *(Entry(name, *split_remark(remark), kept=True) for remark in row.remarks)])


def bare_row(row: Row, reserved: Collection[str]) -> dict[str, Any]:
    """The metadata of a row as far as the source has it, under other names than `reserved`. The others are None."""
    cells = row.columns
    if not cells.keys().isdisjoint(reserved):
        same = {"url": row.name, "caption": row.caption, "key": cells.get("source_key")}
        names = stored_names(cells, reserved)
        cells = {names[name]: value for name, value in cells.items()
                 if name not in reserved or value not in (None, same.get(name))}
    extra = redact_cells(cells)
    return extra | dict.fromkeys(COLUMNS) | {"caption": row.caption, "url": source_name(row), "source_row": row.number}


def source_name(row: Row) -> str:
    """The name of a row as it is stored: text without credentials. Bytes that are not UTF-8 are escaped."""
    return storage.redact_url(_name_text(row))


def old_source_name(row: Row) -> str:
    """The name of a row as versions up to 0.1 stored it."""
    return storage.redact_known_credentials(_name_text(row))


def _name_text(row: Row) -> str:
    try:
        name = row.name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of characters, which JSON can hold
        name = row.name.encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def _check_hash(wanted: str, data: bytes, sha256: str) -> None:
    if not wanted:
        return
    algorithm = _ALGORITHMS[len(wanted)]
    digest = sha256 if algorithm == "sha256" else hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if digest != wanted:
        raise NotFetched("hash_mismatch", f"its {algorithm} is not the one in the list")
