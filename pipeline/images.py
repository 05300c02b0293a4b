"""From the bytes of any picture to 8-bit RGB, and back to bytes; what is wrong gets a name."""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

Resize = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]
Format = Literal["jpg", "png", "webp"]
NARROWEST = 100  # long side to short side
LONGEST = 100_000  # pixels of a side; more is no picture, whatever its other side
# A JPEG is decoded at 1/2, 1/4 or 1/8 while so many times the wanted side is left. Against the Lanczos of the whole
# picture 1.5 keeps 42 dB and more, and stays ahead of OpenCV's INTER_AREA on every picture tried; 1.2 does not.
SPARE = 1.5
_LONGEST = {"jpg": 65500, "webp": 16383}
_LARGEST_PROFILE = 4 << 20  # bytes; profiles of presses have up to 2 MB
# Those that no decoder here knows (HEIC, JPEG XL) are among them, to be counted instead of passed over.
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tga",
            ".tif", ".tiff", ".webp")
# By content, whatever the name; what else Pillow opens (EPS by starting Ghostscript) is nothing to take from the web.
# The first picture would load the rest of the decoders, maybe in several threads at once.
Image.init()
_FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "DIB", "ICO", "JPEG2000", "PPM", "TIFF",
                                   "TGA") if name in Image.OPEN)  # the last tells hardly anything apart
_TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}  # by the orientation in EXIF
Image.MAX_IMAGE_PIXELS = None  # the limit is max_pixels, checked on the header
# Once for all: to silence a single call is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadPicture(ValueError):
    """A picture that cannot be used; `reason` is a word for the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Scaled:
    """The pixels of a JPEG decoded at a fraction, as they are stored: not yet turned upright."""

    pixels: np.ndarray
    """(H, W, 3) uint8"""
    eighths: int
    """Of the whole size, which libjpeg rounds up."""
    orientation: int


@dataclass
class Decoded:
    """A picture as RGB, its size before any resizing, and remarks worth a line in the ledger."""

    image: Image.Image
    width: int
    height: int
    format: str
    plain: bool  # 8-bit RGB as stored, so that its bytes may be kept as they are
    remarks: list[tuple[str, str]] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    """Where in `image` the picture is, if it was decoded at a fraction (whose size is rounded up)."""
    scaled: Scaled | None = None
    """Instead of `image`, which is a blank then: what only `resize` can make something of."""


def check(width: int, height: int, min_size: int, max_aspect: float) -> None:
    """Refuse a short side below `min_size` (too_small) and a long side above `max_aspect` short ones (too_narrow)."""
    if min(width, height) < min_size:
        raise BadPicture("too_small", f"{width} x {height}, less than {min_size}")
    if max(width, height) > max_aspect * min(width, height):
        raise BadPicture("too_narrow", f"{width} x {height}, more than {max_aspect:g} to 1")


def decode(data: bytes, max_pixels: int, *, at_least: int = 0, how: Resize = "center_crop", min_size: int = 0,
           max_aspect: float = NARROWEST) -> Decoded:
    """Decode to 8-bit sRGB, upright, transparent parts on white, the first frame of an animation.

    With `at_least`, a picture that `resize` is going to bring to that size by `how` may come smaller than it is
    (JPEGs do, and then give the Decoded to `resize`, not its image); `width` and `height` are those of the whole.
    BadPicture with the reason empty_file, not_a_picture, too_many_pixels or corrupt, or one of `check`.
    """
    if not data:
        raise BadPicture("empty_file", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise BadPicture("not_a_picture", f"{len(data)} bytes that no decoder knows") from None
    except Image.DecompressionBombError as error:
        raise BadPicture("too_many_pixels", str(error)) from None
    except Exception as error:  # decoders raise whatever they like on hostile headers
        raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None
    # The header tells the size: nothing has been allocated for the pixels yet.
    width, height = image.size
    if min(width, height) < 1:
        raise BadPicture("corrupt", f"{width} x {height}")
    if width * height > max_pixels:
        raise BadPicture("too_many_pixels", f"{width} x {height}, allowed are {max_pixels}")
    if max(width, height) > LONGEST:
        raise BadPicture("too_many_pixels", f"{width} x {height}, a side may have {LONGEST}")
    check(width, height, min_size, max_aspect)
    if at_least and (found := _quickly(image, data, at_least, how)):
        return found
    try:
        # Counting the frames of a GIF reads all of it.
        frames = getattr(image, "n_frames", 1) if image.format in {"GIF", "WEBP", "PNG", "AVIF"} else 1
        part = _fraction(image, at_least, how) if at_least and how != "no" else 1
        if part > 1:
            image.draft(None, (width // part, height // part))
        image.load()
        orientation = _orientation(image)
        method = _TRANSPOSE.get(orientation)
        upright = image if method is None else image.transpose(method)
        rgb = _rgb(upright)
        rgb, converted, complaint = _srgb(rgb, image.mode, image.info.get("icc_profile"))
    except Exception as error:
        raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None
    if part == 1:
        (width, height), box = rgb.size, None
    else:
        box = _box(orientation, width / part, height / part, image.size)
        if orientation >= 5:
            width, height = height, width
    plain = (image.mode == "RGB" and part == 1 and orientation in {0, 1} and frames == 1 and not converted
             and "transparency" not in image.info and not _deep_png(image, data))
    rgb.info = {}  # else `encode` would write comments, and profiles that hold no more
    decoded = Decoded(rgb, width, height, (image.format or "").lower(), plain, box=box)
    if frames > 1:
        decoded.remarks.append(("animated", f"first of {frames} frames taken"))
    if complaint:
        decoded.remarks.append(("bad_profile", complaint))
    return decoded


_BLANK = Image.new("RGB", (1, 1))


def _quickly(image: Image.Image, data: bytes, size: int, how: Resize) -> Decoded | None:
    """What most pictures on the web are, a JPEG of three colours to be made smaller; None for any other."""
    width, height = image.size
    side = max(width, height) if how in {"keep_ratio_largest", "border"} else min(width, height)
    if image.format != "JPEG" or image.mode != "RGB" or how == "no" or side <= size or min(width, height) < 8:
        return None
    profile = image.info.get("icc_profile")
    if profile and (not isinstance(profile, bytes) or len(profile) > _LARGEST_PROFILE
                    or _transform(profile) != ("RGB", None, "")):
        return None
    eighths = min(8, math.ceil(8 * size * SPARE / side))
    rows, columns = (-(-length * eighths // 8) for length in (height, width))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
    except ValueError:
        return None  # Pillow tells what is wrong, and forgives what can be forgiven
    if pixels.shape != (rows, columns, 3):
        return None
    orientation = _orientation(image)
    scaled = Scaled(pixels, eighths, orientation)
    if orientation >= 5:
        width, height = height, width
    return Decoded(_BLANK, width, height, "jpeg", plain=False, scaled=scaled)


def _bicubic(scaled: Scaled, shape: tuple[int, int], whole: tuple[int, int]) -> Image.Image:
    """A JPEG at `shape`, upright: torch's vectors do in half a millisecond what takes Pillow three."""
    import torch  # half a second and half a gigabyte, for those who resize JPEGs
    from torch.nn.functional import interpolate

    method = _TRANSPOSE.get(scaled.orientation)
    (width, height), (columns, rows) = shape, whole
    if scaled.orientation >= 5:
        (width, height), (columns, rows) = (height, width), (rows, columns)
    # This way round torch sees that the channels come last, and neither copies what comes in nor turns what goes out.
    pixels = torch.from_numpy(scaled.pixels)[None].permute(0, 3, 1, 2)
    # The scale is that of the whole picture, and a hair more: the size is rounded down.
    down = ((height + 1e-6) / (rows * scaled.eighths / 8), (width + 1e-6) / (columns * scaled.eighths / 8))
    small = interpolate(pixels, scale_factor=down, mode="bicubic", antialias=True, recompute_scale_factor=False)
    image = Image.fromarray(small[0, :, :height, :width].permute(1, 2, 0).contiguous().numpy())
    return image if method is None else image.transpose(method)


def _fraction(image: Image.Image, size: int, how: Resize) -> int:
    """1, 2, 4 or 8: at which part of its size libjpeg may decode, so that `resize` still has enough to choose from."""
    if image.format not in {"JPEG", "MPO"}:
        return 1
    side = max(image.size) if how in {"keep_ratio_largest", "border"} else min(image.size)
    return next((part for part in (8, 4, 2) if side >= part * SPARE * size and min(image.size) >= part), 1)


def _box(orientation: int, width: float, height: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where the picture is in an upright image that before it was turned had `size`, and the picture upper left."""
    spare_x, spare_y = size[0] - width, size[1] - height
    x, y = (0.0, width), (0.0, height)
    if orientation in {2, 3, 7, 8}:  # what was right is left now, or on top
        x = (spare_x, size[0])
    if orientation in {3, 4, 6, 7}:
        y = (spare_y, size[1])
    return (y[0], x[0], y[1], x[1]) if orientation >= 5 else (x[0], y[0], x[1], y[1])


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 0)
    except Exception:  # a spoiled EXIF block, frequent in the wild, does not spoil the picture
        return 0
    return value if isinstance(value, int) and value in range(9) else 0


def _deep_png(image: Image.Image, data: bytes) -> bool:
    return image.format == "PNG" and data[24] > 8  # bits a channel, in the header; Pillow drops those above 8


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, except that CMYK stays what it is: its profile comes first."""
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
    return image if image.mode in {"RGB", "CMYK"} else image.convert("RGB")


def _srgb(image: Image.Image, stored: str, profile: Any) -> tuple[Image.Image, bool, str]:
    """RGB or CMYK with a profile -> sRGB, whether the profile changed it, and what is wrong with the profile.

    `stored` is the mode of the file: a profile of greys is taken for pictures stored as greys only.
    """
    transform, complaint = None, ""
    if profile:
        if not isinstance(profile, bytes) or len(profile) > _LARGEST_PROFILE:
            complaint = "no profile, or a giant"
        else:
            space, transform, complaint = _transform(profile)
            grey = stored in {"1", "L", "LA", "La"} or stored.startswith("I;16")
            if not complaint and space != image.mode and not (space == "L" and grey):
                transform, complaint = None, f"a profile for {space} in a picture of {stored}"
            elif transform is not None and space == "L":
                image = image.getchannel(0)
    if transform is not None:
        return ImageCms.applyTransform(image, transform), True, complaint  # type: ignore[return-value]
    return image if image.mode == "RGB" else image.convert("RGB"), False, complaint


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None, str]:
    """The mode a profile is for, its way to sRGB, and what is wrong with it; without a way if it is sRGB already.

    That is seen by what it does, for sRGB has many profiles and names. Two steps of 255 are what they differ by.
    """
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        space = str(source.profile.xcolor_space).strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        if mode is None:
            return space, None, f"a profile for {space}"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB",
                                            ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                            ImageCms.Flags.BLACKPOINTCOMPENSATION)
        if mode != "CMYK":
            levels = np.arange(0, 256, 15, np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
            probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
            moved = ImageCms.applyTransform(probe, transform)
            if np.abs(np.asarray(moved, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max() <= 2:
                return mode, None, ""
    except Exception as error:
        return "", None, f"{type(error).__name__}: {error}"
    return mode, transform, ""


def resize(image: Image.Image | Decoded, size: int, how: Resize, *, only_if_bigger: bool = False,
           max_aspect: float = NARROWEST) -> Image.Image:
    """Resize with Lanczos, in one step from the part that is wanted; JPEGs of the usual kind with bicubic.

    center_crop: the middle square at `size`; keep_ratio: the short side; keep_ratio_largest: the long side; border:
    the long side, and white around it to a square; no: as it is. With `only_if_bigger` nothing is enlarged: the side
    in question stays below `size`. Squares remain squares then: center_crop takes the middle at its own size, border
    adds white up to `size` (img2dataset leaves such pictures neither cropped nor padded).
    What needs no change is returned itself. BadPicture with the reason too_narrow beyond `max_aspect`, or where a
    hair's breadth would be blown up to a giant.
    """
    scaled, box = None, None
    if isinstance(image, Decoded):
        scaled, box, (width, height), image = image.scaled, image.box, (image.width, image.height), image.image
    else:
        width, height = image.size
    if how == "no":
        return image
    check(width, height, 0, max_aspect)
    longest = how in {"keep_ratio_largest", "border"}
    side = max(width, height) if longest else min(width, height)
    wanted = min(size, side) if only_if_bigger else size
    scale = wanted / side
    smallest = 1 if longest else wanted
    shape = (max(smallest, round(width * scale)), max(smallest, round(height * scale)))
    if max(shape) > LONGEST:
        raise BadPicture("too_narrow", f"{width} x {height} would become {shape[0]} x {shape[1]}")
    if how == "center_crop":
        # The middle of what the whole would become, by whole pixels.
        left, top = (shape[0] - wanted) // 2, (shape[1] - wanted) // 2
        square = (left, top, left + wanted, top + wanted)
        if scaled is not None:
            return _bicubic(scaled, shape, (width, height)).crop(square)
        if wanted == side and box is None:
            return image if width == height else image.crop(square)
        x, y = width / shape[0], height / shape[1]
        part = (left * x, top * y, square[2] * x, square[3] * y)
        return _lanczos(image, (wanted, wanted), part, (width, height), box)
    if scaled is not None:
        image = _bicubic(scaled, shape, (width, height))
    elif shape != image.size or box is not None:
        image = _lanczos(image, shape, (0, 0, width, height), (width, height), box)
    if how == "border" and shape != (size, size):
        white = Image.new("RGB", (size, size), "white")
        white.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2))
        return white
    return image


def _lanczos(image: Image.Image, shape: tuple[int, int], part: tuple[float, float, float, float],
             whole: tuple[int, int], box: tuple[float, float, float, float] | None) -> Image.Image:
    """`part` of a picture of the size `whole`, that lies at `box` of `image`, in `shape` pixels."""
    if box is not None:
        x, y = (box[2] - box[0]) / whole[0], (box[3] - box[1]) / whole[1]
        part = (box[0] + part[0] * x, box[1] + part[1] * y, box[0] + part[2] * x, box[1] + part[3] * y)
        part = (max(part[0], 0), max(part[1], 0), min(part[2], image.width), min(part[3], image.height))
    # Four times and more too large: averaged by whole pixels first (47 dB and more against none of it).
    return image.resize(shape, Image.Resampling.LANCZOS, box=part, reducing_gap=2.0)


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
    return np.asarray(decode(data, max_pixels=1 << 40, max_aspect=float("inf")).image)


def patches(image: Image.Image, size: int, count: int, seed: int, key: str) -> list[tuple[int, int, Image.Image]]:
    """`count` squares of `size` cut at random from `image`: left, top, and the square.

    Where is a function of (seed, key, number of the square) and nothing else, every place as likely as any other.
    BadPicture with the reason too_small if there is no room.
    """
    if min(image.size) < size:
        raise BadPicture("too_small", f"{image.width} x {image.height}, less than a patch of {size}")
    result = []
    for number in range(count):
        drawn = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogateescape")).digest()
        # 128 bits each: what the remainder prefers is beyond measure.
        left = int.from_bytes(drawn[:16], "big") % (image.width - size + 1)
        top = int.from_bytes(drawn[16:], "big") % (image.height - size + 1)
        result.append((left, top, image.crop((left, top, left + size, top + size))))
    return result


def pixel_hash(image: Image.Image) -> str:
    """sha256 of size and pixels as RGB: equal for equal pictures, however they were encoded."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.sha256(b"%d %d\n" % rgb.size)
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def perceptual_hash(image: Image.Image) -> tuple[int, tuple[int, int, int]]:
    """pHash (64 bits, the same but for a few bits for a copy scaled or encoded anew), and the mean colour.

    pHash sees luminance alone, without its level: a red square and a blue one, a blank picture and any other have the
    same. The mean colour tells these apart.
    """
    import imagehash  # loads scipy

    rgb = image if image.mode == "RGB" else image.convert("RGB")
    bits = imagehash.phash(rgb).hash.flatten()
    mean = rgb.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), mean  # type: ignore[return-value]
