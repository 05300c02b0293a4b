"""From one row of a source to its samples."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.media.decode import decode
from pipeline.media.hashes import perceptual_hash, pixel_hash
from pipeline.media.resize import cut_patches, encode, resize
from pipeline.media.types import BadImage, Pixels, size_of
from pipeline.shards.metadata import COLUMNS, NOT_FETCHED, NOT_USABLE, SUCCESS
from pipeline.sources.rows import Row
from pipeline.stages.types import Entry

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}


class NotFetched(BadImage):
    """A picture whose bytes were not to be had."""


@dataclass
class RowResult:
    """What became of a row: metadata for the parquet, one for each sample or one that says what is wrong."""

    metas: list[dict[str, Any]]
    pictures: list[bytes] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def transform_row(config: "ShardConfig", row: Row, data: bytes, keys: list[str]) -> RowResult:
    """The samples of a row whose picture's bytes are `data`; BadImage if there are none."""
    fetched = hashlib.sha256(data).hexdigest()
    _check_hash(row.digest, data, fetched)
    patched = config.patches > 0
    picture = decode(data, config.max_pixels, at_least=config.patch_side if patched else config.image_size,
                            how="keep_ratio" if patched else config.resize, min_size=config.min_size,
                            max_aspect=config.max_aspect)
    meta = bare_row(row) | {"status": SUCCESS, "original_width": picture.width, "original_height": picture.height,
                        "exif": _exif(data) if config.exif else None, "original_sha256": fetched}
    made = RowResult([], entries=[Entry(source_name(row), reason, detail, kept=True)
                                  for reason, detail in picture.remarks])
    if patched:
        whole = resize(picture, config.patch_side, "keep_ratio", only_if_bigger=config.only_if_bigger,
                              max_aspect=config.max_aspect)
        for (left, top, patch), key in zip(cut_patches(whole, config.image_size, config.patches, config.seed,
                                                          row.name), keys, strict=True):
            place = {"patch_left": left, "patch_top": top, "patch_short_side": min(size_of(whole))}
            _add(made, config, meta | place, key, patch, encode(patch, config.format, config.quality))
        return made
    resized = resize(picture, config.image_size, config.resize, only_if_bigger=config.only_if_bigger,
                            max_aspect=config.max_aspect)
    same = resized is picture.image and picture.plain
    stored = {"jpg": "jpeg"}.get(config.format, config.format)
    _add(made, config, meta, keys[0], resized,
         data if same and picture.format == stored else encode(resized, config.format, config.quality))
    return made


def _add(made: RowResult, config: "ShardConfig", meta: dict[str, Any], key: str, image: Pixels, data: bytes) -> None:
    width, height = size_of(image)
    meta = meta | {"key": key, "width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}
    if config.duplicates != "keep":
        meta["pixel_sha256"] = pixel_hash(image)
        if config.duplicates == "near":
            meta["phash"], meta["mean_colour"] = perceptual_hash(image)
    made.metas.append(meta)
    made.pictures.append(data)


def failed_row(row: Row, key: str, bad: BadImage) -> RowResult:
    """A row that gives no sample."""
    status = NOT_FETCHED if isinstance(bad, NotFetched) else NOT_USABLE
    detail = storage.redact_credentials(bad.detail)
    return RowResult([bare_row(row) | {"key": key, "status": status, "error_message": f"{bad.reason}: {detail}"}],
                entries=[Entry(source_name(row), bad.reason, detail)])


def bare_row(row: Row) -> dict[str, Any]:
    """The metadata of a row of which nothing is known but what the source says."""
    extra = {name: value for name, value in row.columns.items() if name not in COLUMNS}
    return extra | dict.fromkeys(COLUMNS) | {"caption": row.caption, "url": source_name(row), "source_row": row.number}


def source_name(row: Row) -> str:
    """What a row is called, as text without passwords: bytes that are no UTF-8 are spelled out."""
    try:
        name = row.name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of characters, which JSON can spell
        name = row.name.encode("utf-8", "backslashreplace")
    return storage.redact_credentials(name.decode("utf-8", "backslashreplace"))


def _check_hash(wanted: str, data: bytes, sha256: str) -> None:
    if not wanted:
        return
    algorithm = _ALGORITHMS[len(wanted)]
    found = sha256 if algorithm == "sha256" else hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if found != wanted:
        raise NotFetched("hash_mismatch", f"its {algorithm} is not the one in the list")


def _exif(data: bytes) -> str:
    """The EXIF of a picture as JSON, tags by name."""
    import io

    from PIL import ExifTags, Image
    try:
        with Image.open(io.BytesIO(data)) as image:
            tags = image.getexif()
            every = {**tags, **tags.get_ifd(ExifTags.IFD.Exif)}
    except Exception:  # a spoiled EXIF block, frequent in the wild, does not spoil the picture
        return "{}"
    return json.dumps({ExifTags.TAGS.get(tag, str(tag)): str(value)[:500] for tag, value in sorted(every.items())})
