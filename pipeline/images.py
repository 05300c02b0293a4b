"""From the bytes of any picture to 8-bit RGB, and back to bytes; what is wrong gets a name."""

import io
import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Resize = Literal["center_crop", "keep_ratio", "no"]
Format = Literal["jpg", "png", "webp"]
NARROWEST = 100  # long side to short side
_LONGEST = {"jpg": 65500, "webp": 16383}
# Those that no decoder here knows (HEIC, JPEG XL) are among them, to be counted instead of passed over.
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tga",
            ".tif", ".tiff", ".webp")
Image.MAX_IMAGE_PIXELS = None  # the limit is max_pixels, checked on the header


class BadPicture(ValueError):
    """A picture that cannot be used; `reason` is a word for the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Decoded:
    """A picture as RGB, its size before any resizing, and remarks worth a line in the ledger."""

    image: Image.Image
    width: int
    height: int
    format: str
    plain: bool  # 8-bit RGB as stored, so that its bytes may be kept as they are
    remarks: list[tuple[str, str]] = field(default_factory=list)


def decode(data: bytes, max_pixels: int) -> Decoded:
    """Decode to 8-bit RGB, upright, transparent parts on white, the first frame of an animation.

    BadPicture with the reason empty_file, not_a_picture, too_many_pixels or corrupt.
    """
    if not data:
        raise BadPicture("empty_file", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise BadPicture("not_a_picture", f"{len(data)} bytes that no decoder knows") from None
        except Image.DecompressionBombError as error:
            raise BadPicture("too_many_pixels", str(error)) from None
        except Exception as error:  # decoders raise whatever they like on hostile headers
            raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None
        # The header tells the size: nothing has been allocated for the pixels yet.
        if image.width * image.height > max_pixels:
            raise BadPicture("too_many_pixels", f"{image.width} x {image.height}, allowed are {max_pixels}")
        try:
            # Counting the frames of a GIF reads all of it.
            frames = getattr(image, "n_frames", 1) if image.format in {"GIF", "WEBP", "PNG", "AVIF"} else 1
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _rgb(upright)
        except Exception as error:
            raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None
    decoded = Decoded(rgb, rgb.width, rgb.height, (image.format or "").lower(),
                      plain=image.mode == "RGB" and upright.size == image.size and not image.getexif().get(0x0112)
                      and frames == 1 and "transparency" not in image.info and not _deep_png(image, data))
    if frames > 1:
        decoded.remarks.append(("animated", f"first of {frames} frames taken"))
    return decoded


def _deep_png(image: Image.Image, data: bytes) -> bool:
    return image.format == "PNG" and data[24] > 8  # bits a channel, in the header; Pillow drops those above 8


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these at 255; 16-bit greys are scaled instead. The other modes do not tell their range.
        values = np.asarray(image, np.float64)
        highest = values.max(initial=0)
        if image.mode == "F":
            top = 1.0 if 0 < highest <= 1.0 else 255.0
        else:
            top = 65535.0 if image.mode.startswith("I;16") or highest > 255 else 255.0
        return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image: Image.Image, size: int, how: Resize) -> Image.Image:
    """Resize with Lanczos: short side to `size` and the middle square, or only the short side, or not at all.

    BadPicture with the reason too_narrow where a hair's breadth would be blown up to a giant.
    """
    if how == "no":
        return image
    if max(image.size) > NARROWEST * min(image.size):
        raise BadPicture("too_narrow", f"{image.width} x {image.height}, more than {NARROWEST} to 1")
    scale = size / min(image.size)
    wanted = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if wanted != image.size:
        image = image.resize(wanted, Image.Resampling.LANCZOS)
    if how == "keep_ratio" or image.width == image.height:
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def encode(image: Image.Image, format_: Format, quality: int) -> bytes:
    """The bytes of `image` as jpg, png or webp; BadPicture with the reason too_large where the format has no room."""
    buffer = io.BytesIO()
    if max(image.size) > _LONGEST.get(format_, 1 << 31):
        raise BadPicture("too_large", f"{image.width} x {image.height}, {format_} ends at {_LONGEST[format_]}")
    if format_ == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG" if format_ == "jpg" else "WEBP", quality=quality)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """The picture of a shard as (H, W, 3) uint8; BadPicture if it does not decode."""
    return np.asarray(decode(data, max_pixels=1 << 40).image)
