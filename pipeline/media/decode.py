"""Decode any image to upright 8-bit RGB. Each fault has a reason code."""

import contextlib
import importlib.util
import io
import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from pipeline.media import image_headers, isolation, jpeg_damage
from pipeline.media.types import LONG_SIDE_MODES, LONGEST, NARROWEST, BadImage, Decoded, Resize, check_size

# A JPEG is decoded at 1/2, 1/4 or 1/8 while so many times the wanted side is left. Against the Lanczos of the whole
# image 1.5 keeps 42 dB and more, and stays ahead of OpenCV's INTER_AREA on every image tried; 1.2 does not.
SPARE = 1.5
_LARGEST_EXIF = 1 << 16  # bytes
_LARGEST_PROFILE = 4 << 20  # bytes; profiles of presses have up to 2 MB
# By content, whatever the name; what else Pillow opens (EPS by starting Ghostscript) is nothing to take from the web.
# Otherwise the first image would load the rest of the decoders, maybe in several threads.
Image.init()
_FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "DIB", "ICO", "JPEG2000", "PPM", "TIFF",
                                   "TGA") if name in Image.OPEN)  # the last tells hardly anything apart
_PNG_END = b"IEND\xaeB`\x82"
_EXTRA_FORMATS = {"HEIF": ("HEIC", "pi-heif"), "JXL": ("JPEG XL", "pillow-jxl-plugin")}
_EXTRA_MODULES = {"HEIF": "pi_heif", "JXL": "pillow_jxl"}
NEEDS_FORMATS_EXTRA = "needs_formats_extra"
"""The reason of an image whose decoder is not installed."""
_JPEG_FORMATS = {"JPEG", "MPO"}
_TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}  # by the orientation in EXIF
Image.MAX_IMAGE_PIXELS = None  # the limit is max_pixels, checked on the header
# Once for all: to silence a single call is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes, max_pixels: int, *, at_least: int = 0, how: Resize = "center_crop", min_size: int = 0,
           max_aspect: float = NARROWEST) -> Decoded:
    """Decode to 8-bit sRGB, upright, transparent parts on white, the first frame of an animation.

    With `at_least`, an image that `resize` is going to bring to that size by `how` may come smaller than it is
    (JPEGs do, and then give the Decoded to `resize`, not its image); `width` and `height` are those of the whole.
    BadImage with the reason empty_file, not_a_picture, needs_formats_extra, too_many_pixels, too_many_scans, too_slow,
    too_much_memory or corrupt, or one of `check_size`. A remark with the reason damaged says what a JPEG has lost.
    """
    if not data:
        raise BadImage("empty_file", "0 bytes")
    arguments = data, max_pixels, at_least, how, min_size, max_aspect
    if image_headers.is_suspicious(data):
        sizes = image_headers.sizes_before_opening(data)
        return _isolated(arguments, large=any(math.prod(size) > isolation.MOST_PIXELS for size in sizes))
    try:
        return _decode(*arguments, True)
    except isolation.NeedsIsolation as found:
        return _isolated(arguments, large=bool(found.args))


def _isolated(arguments: tuple[Any, ...], *, large: bool = False) -> Decoded:
    decoded, is_pillow = isolation.call(_decode_to_pixels, *arguments, large=large)
    if is_pillow:  # two libraries resize the two kinds, with other last bits
        decoded.image = Image.fromarray(decoded.image)
    return decoded


def _decode_to_pixels(data: bytes, max_pixels: int, at_least: int, how: Resize, min_size: int, max_aspect: float
                      ) -> tuple[Decoded, bool]:
    decoded = _decode(data, max_pixels, at_least, how, min_size, max_aspect, False)
    is_pillow, decoded.image = isinstance(decoded.image, Image.Image), np.asarray(decoded.image)
    return decoded, is_pillow


def register_extra_formats() -> None:
    """Let Pillow decode HEIC and JPEG XL in this process, if the packages of the extra `formats` are installed."""
    with contextlib.suppress(ModuleNotFoundError):
        import pi_heif
        pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    with contextlib.suppress(ModuleNotFoundError):
        from pillow_jxl import JpegXLImagePlugin
        JpegXLImagePlugin.DECODE_THREADS = 0  # threads count against the limit of memory


def installed_formats() -> list[str]:
    """The details of failures with the reason needs_formats_extra whose packages are installed now."""
    return [_missing_package(extra) for extra, module in _EXTRA_MODULES.items() if importlib.util.find_spec(module)]


def _missing_package(extra: str) -> str:
    return "{}; pip install {}".format(*_EXTRA_FORMATS[extra])


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header of an image says. BadImage as `decode`."""
    if image_headers.is_suspicious(data):
        return isolation.call(_read_size, data)
    return _read_size(data)


def read_exif(data: bytes) -> dict[str, str]:
    """The EXIF of an image, values cut to 500 characters, by the names of the tags; {} if it is damaged."""
    try:
        try:
            return _read_exif(data, not image_headers.is_suspicious(data))
        except isolation.NeedsIsolation:
            return isolation.call(_read_exif, data, False)
    except BadImage:
        return {}


def _read_size(data: bytes) -> tuple[int, int]:
    with _open(data) as image:
        return image.size


def _read_exif(data: bytes, here: bool) -> dict[str, str]:
    if not here and not isolation.is_child():
        raise isolation.NeedsIsolation
    with _open(data) as image:
        if here:
            _check_exif(image)
        try:
            tags = image.getexif()
            every = {**tags, **tags.get_ifd(ExifTags.IFD.Exif)}
        except Exception:  # a damaged EXIF block is frequent on the web and does not damage the image
            return {}
    return {ExifTags.TAGS.get(tag, str(tag)): str(value)[:500] for tag, value in sorted(every.items())}


def _open(data: bytes) -> Image.Image:
    extra = image_headers.extra_format(data)
    try:
        return Image.open(io.BytesIO(data), formats=(*_FORMATS, extra) if extra in Image.OPEN else _FORMATS)
    except UnidentifiedImageError:
        if extra in Image.OPEN:
            raise BadImage("corrupt", f"a damaged {_EXTRA_FORMATS[extra][0]}") from None
        if extra:
            raise BadImage(NEEDS_FORMATS_EXTRA, _missing_package(extra)) from None
        raise BadImage("not_a_picture", f"{len(data)} bytes that no decoder knows") from None
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from None
    except MemoryError:
        raise BadImage("too_much_memory", "for its header") from None
    except Exception as error:  # decoders raise whatever they like on hostile headers
        detail = f"a damaged {_EXTRA_FORMATS[extra][0]}" if extra else f"{type(error).__name__}: {error}"
        raise BadImage("corrupt", detail) from None


def _check_exif(image: Image.Image) -> None:
    """NeedsIsolation if EXIF data is larger than a JPEG's segment: each of its tags may refer to all of it."""
    if any(len(image.info.get(name, b"")) > _LARGEST_EXIF for name in ("exif", "Raw profile type exif")):
        raise isolation.NeedsIsolation


def _decode(data: bytes, max_pixels: int, at_least: int, how: Resize, min_size: int, max_aspect: float, here: bool
            ) -> Decoded:
    """`decode` in this process. NeedsIsolation if it should not be done `here`."""
    limits = max_pixels, at_least, how, min_size, max_aspect, here
    try:
        return _decode_undamaged(data, *limits)
    except jpeg_damage.DamagedJpeg:
        if here:
            raise isolation.NeedsIsolation from None  # a hostile image may need many tries
    data, loss = jpeg_damage.repair(data)
    decoded = _decode_undamaged(data, *limits, strict=False)
    decoded.plain = False  # the bytes as they are stay damaged
    decoded.remarks.append(("damaged", loss))
    return decoded


def _decode_undamaged(data: bytes, max_pixels: int, at_least: int, how: Resize, min_size: int, max_aspect: float,
                      here: bool, *, strict: bool = True) -> Decoded:
    """`_decode` of an image without damage. DamagedJpeg for a JPEG that has some, if `strict`."""
    for size in image_headers.sizes_before_opening(data):
        _check_pixels(*size, max_pixels)
        if image_headers.extra_format(data):
            isolation.allow(math.prod(size))  # a JPEG XL is decoded when it is opened
    image = _open(data)
    # The header has the size: no memory has been allocated for the pixels yet.
    width, height = image.size
    _check_pixels(width, height, max_pixels)
    check_size(width, height, min_size, max_aspect)
    if any(0 in table for table in getattr(image, "quantization", {}).values()):
        raise BadImage("corrupt", "its quantization table has a zero")
    if here:
        decoder = image.tile[0][0] if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
        if width * height > isolation.MOST_PIXELS:
            raise isolation.NeedsIsolation("large")
        if not image_headers.is_plain(image.format, decoder):
            raise isolation.NeedsIsolation
        _check_exif(image)
    isolation.allow(width * height)
    if at_least and (reduced := _decode_reduced(image, data, at_least, how, strict)):
        return reduced
    try:
        # Counting the frames of a GIF reads all of it.
        many = image.format == "GIF" and image_headers.has_many_frames(data)
        frames = image_headers.MOST_FRAMES if many else (
            getattr(image, "n_frames", 1) if image.format in {"GIF", "WEBP", "PNG", "AVIF", "HEIF", "TIFF"} else 1)
        part = _reduction(image, at_least, how) if at_least and how != "no" else 1
        pixels = _load(image, data, part, strict)
        if here:
            _check_exif(image)
        orientation = _read_orientation(image)
        method = _TRANSPOSE.get(orientation)
        upright = pixels if method is None else pixels.transpose(method)
        rgb = _to_rgb(upright)
        rgb, converted, complaint = _to_srgb(rgb, image.mode, image.info.get("icc_profile"))
    except (isolation.NeedsIsolation, jpeg_damage.DamagedJpeg, BadImage):
        raise
    except MemoryError:
        raise BadImage("too_much_memory", f"{width} x {height}") from None
    except Exception as error:
        raise BadImage("corrupt", f"{type(error).__name__}: {error}") from None
    box = None if part == 1 else _box(orientation, width / part, height / part, pixels.size)
    width, height = upright.size if part == 1 else (height, width) if orientation >= 5 else (width, height)
    has_end = image.format != "PNG" or _PNG_END in data
    plain = (image.mode == "RGB" and part == 1 and orientation in {0, 1} and frames == 1 and not converted and has_end
             and "transparency" not in image.info and not _is_deep_png(image, data))
    rgb.info = {}  # else `encode` would write comments, and profiles that hold no more
    decoded = Decoded(rgb, width, height, (image.format or "").lower(), plain, box=box)
    if frames > 1:
        decoded.remarks.append(("animated", f"first of {frames} frames{' or more' if many else ''} taken"))
    if not has_end:
        decoded.remarks.append(("damaged", "the end marker is missing; no pixel is lost"))
    if complaint:
        decoded.remarks.append(("bad_profile", complaint))
    return decoded


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < 1:
        raise BadImage("corrupt", f"{width} x {height}")
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height}, allowed are {max_pixels}")
    if max(width, height) > LONGEST:
        raise BadImage("too_many_pixels", f"{width} x {height}, a side may have {LONGEST}")


def _load(image: Image.Image, data: bytes, part: int, strict: bool) -> Image.Image:
    """The pixels of an image, a JPEG at 1/`part` of its size. DamagedJpeg if they are not all in the file."""
    width, height = image.size
    if image.format in _JPEG_FORMATS:
        try:
            if image.mode in {"RGB", "L"}:  # the same pixels as from Pillow, in the same time
                colorspace = "RGB" if image.mode == "RGB" else "GRAY"
                pixels = jpeg_damage.decode_jpeg(data, colorspace, -(-width // part), -(-height // part), strict=strict)
                return Image.fromarray(pixels if image.mode == "RGB" else pixels[..., 0])
            jpeg_damage.decode_jpeg(data, "GRAY", 1, 1, strict=strict)
        except jpeg_damage.DamagedJpeg:
            raise
        except ValueError:
            pass  # Pillow tells what is wrong, and forgives what can be forgiven
    if part > 1:
        image.draft(None, (width // part, height // part))
    image.load()
    return image


def _decode_reduced(image: Image.Image, data: bytes, size: int, how: Resize, strict: bool) -> Decoded | None:
    """The fast path for an RGB JPEG that becomes smaller, as most images on the web do. None for other images."""
    (width, height), part = image.size, _reduction(image, size, how)
    side = max(width, height) if how in LONG_SIDE_MODES else min(width, height)
    if image.format != "JPEG" or image.mode != "RGB" or how == "no" or side <= size:
        return None
    profile = image.info.get("icc_profile")
    if profile and (not isinstance(profile, bytes) or len(profile) > _LARGEST_PROFILE
                    or _profile_transform(profile) != ("RGB", None, "")):
        return None
    stored = (-(-width // part), -(-height // part))
    try:
        pixels = jpeg_damage.decode_jpeg(data, "RGB", *stored, strict=strict)
    except jpeg_damage.DamagedJpeg:
        raise
    except ValueError:
        return None  # Pillow tells what is wrong, and forgives what can be forgiven
    if pixels.shape != (stored[1], stored[0], 3):
        return None
    orientation = _read_orientation(image)
    box = _box(orientation, width / part, height / part, stored)
    if orientation >= 5:
        width, height = height, width
    return Decoded(_turn_upright(pixels, orientation), width, height, "jpeg", plain=False, box=box)


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as the EXIF orientation wants them, without a copy."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down, right = orientation in {3, 4, 7, 8}, orientation in {2, 3, 6, 7}
    return pixels[::-1 if down else 1, ::-1 if right else 1]


def _reduction(image: Image.Image, size: int, how: Resize) -> int:
    """1, 2, 4 or 8: at which part of its size libjpeg may decode, so that `resize` still has enough to choose from."""
    if image.format not in _JPEG_FORMATS:
        return 1
    side = max(image.size) if how in LONG_SIDE_MODES else min(image.size)
    # Colors that are coarser one way than the other do not come out even from a small fraction (32 dB).
    most = 8 if all(across == down for _, across, down, _ in getattr(image, "layer", ())) else 2
    return next((part for part in (8, 4, 2)
                 if part <= most and side >= part * SPARE * size and min(image.size) >= part), 1)


def _box(orientation: int, width: float, height: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of the image after it was turned upright. Before, it lay at the upper left of an image of `size`."""
    spare_x, spare_y = size[0] - width, size[1] - height
    x, y = (0.0, width), (0.0, height)
    if orientation in {2, 3, 7, 8}:  # what was right is left now, or on top
        x = (spare_x, size[0])
    if orientation in {3, 4, 6, 7}:
        y = (spare_y, size[1])
    return (y[0], x[0], y[1], x[1]) if orientation >= 5 else (x[0], y[0], x[1], y[1])


def _read_orientation(image: Image.Image) -> int:
    if image.format == "JXL" and not image.jpeg:  # type: ignore[attr-defined]
        return 0  # its decoder has turned it; its EXIF still says how the camera was held
    try:
        value = image.getexif().get(0x0112, 0)
    except Exception:  # a spoiled EXIF block, frequent in the wild, does not spoil the image
        return 0
    return value if isinstance(value, int) and value in range(9) else 0


def _is_deep_png(image: Image.Image, data: bytes) -> bool:
    return image.format == "PNG" and data[24] > 8  # bits a channel, in the header; Pillow drops those above 8


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, except that CMYK stays what it is: its profile comes first."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these at 255; 16-bit greys are scaled instead. The other modes do not tell their range.
        values = np.asarray(image, np.float64)
        lowest, highest = values.min(initial=0), values.max(initial=0)
        ranges = (1.0, 255.0) if image.mode == "F" else (65535.0,) if image.mode != "I" else (255.0, 65535.0)
        # Floats that were resized go beyond their range by a little. NaN fits no range.
        top = next((top for top in ranges if highest < top * 1.001), None) if lowest > -0.001 * ranges[0] else None
        if top is None:
            raise BadImage("corrupt", f"its numbers go from {lowest:g} to {highest:g}, expected 0 to "
                                      f"{' or '.join(f'{top:g}' for top in ranges)}")
        return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in {"RGB", "CMYK"} else image.convert("RGB")


def _to_srgb(image: Image.Image, stored: str, profile: Any) -> tuple[Image.Image, bool, str]:
    """RGB or CMYK with a profile -> sRGB, whether the profile changed it, and what is wrong with the profile.

    `stored` is the mode of the file: a profile of greys is taken for images stored as greys only.
    """
    transform, complaint = None, ""
    if profile:
        if not isinstance(profile, bytes) or len(profile) > _LARGEST_PROFILE:
            complaint = "no profile, or a giant"
        else:
            space, transform, complaint = _profile_transform(profile)
            grey = stored in {"1", "L", "LA", "La"} or stored.startswith("I;16")
            if not complaint and space != image.mode and not (space == "L" and grey):
                transform, complaint = None, f"a profile for {space} in an image of {stored}"
            elif transform is not None and space == "L":
                image = image.getchannel(0)
    if transform is not None:
        return ImageCms.applyTransform(image, transform), True, complaint  # type: ignore[return-value]
    return image if image.mode == "RGB" else image.convert("RGB"), False, complaint


@lru_cache(maxsize=64)
def _profile_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None, str]:
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
            levels = np.arange(0, 256, 15, dtype=np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
            probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
            moved = ImageCms.applyTransform(probe, transform)
            if np.abs(np.asarray(moved, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max() <= 2:
                return mode, None, ""
    except Exception as error:
        return "", None, f"{type(error).__name__}: {error}"
    return mode, transform, ""
