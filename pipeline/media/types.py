"""Types and limits of images that all steps of decoding share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:  # the settings of shard are here too, and they need neither
    import numpy as np
    from PIL import Image

Pixels: TypeAlias = "Image.Image | np.ndarray"
"""RGB of 8 bits: an image of Pillow's, or (H, W, 3) uint8."""
Kernel = Literal["lanczos", "bicubic", "bilinear"]
Resize = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]
Format = Literal["jpg", "png", "webp"]
NARROWEST = 100  # long side to short side
LONGEST = 100_000  # pixels of a side; more is no image, whatever its other side
LONG_SIDE_MODES = {"keep_ratio_largest", "border"}  # ways of resizing in which the long side counts
JPEG_MAGIC = b"\xff\xd8\xff"
# HEIC and JPEG XL are among them also without the extra `formats`, so that they are counted.
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl", ".pgm",
            ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a word for the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


@dataclass
class Decoded:
    """An image as RGB, its size before any resizing, and remarks worth a line in the ledger."""

    image: Pixels
    width: int
    height: int
    format: str
    plain: bool  # 8-bit RGB as stored, so that its bytes may be kept as they are
    remarks: list[tuple[str, str]] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    """The box of the image in `image`, if it was decoded at a fraction. The decoder rounds its size up."""


def check_size(width: int, height: int, min_size: int, max_aspect: float) -> None:
    """Refuse a short side below `min_size` (too_small) and a long side above `max_aspect` short ones (too_narrow)."""
    if min(width, height) < min_size:
        raise BadImage("too_small", f"{width} x {height}, less than {min_size}")
    if max(width, height) > max_aspect * min(width, height):
        raise BadImage("too_narrow", f"{width} x {height}, more than {max_aspect:g} to 1")


def size_of(image: Pixels) -> tuple[int, int]:
    """Width and height."""
    from PIL import Image
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
