"""From the bytes of any picture to 8-bit RGB, and back to bytes; what is wrong gets a name."""

import hashlib
import io
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

try:
    from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
except ImportError:  # no wheel for this machine; Pillow does the same, and takes its time
    Resizer = None

Pixels = Image.Image | np.ndarray
"""RGB of 8 bits: an image of Pillow's, or (H, W, 3) uint8."""
Kernel = Literal["lanczos", "bicubic", "bilinear"]
Resize = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]
Format = Literal["jpg", "png", "webp"]
NARROWEST = 100  # long side to short side
LONGEST = 100_000  # pixels of a side; more is no picture, whatever its other side
# A JPEG is decoded at 1/2, 1/4 or 1/8 while so many times the wanted side is left. Against the Lanczos of the whole
# picture 1.5 keeps 42 dB and more, and stays ahead of OpenCV's INTER_AREA on every picture tried; 1.2 does not.
SPARE = 1.5
_KERNELS = {} if Resizer is None else {"lanczos": FilterType.lanczos3, "bicubic": FilterType.catmull_rom,
                                         "bilinear": FilterType.bilinear}
_LONG_SIDE = {"keep_ratio_largest", "border"}  # ways of resizing in which the long side counts
_LONGEST = {"jpg": 65500, "webp": 16383}
_JPEG = b"\xff\xd8\xff"
_INSIDE = 1 - 2 ** -50
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
class Decoded:
    """A picture as RGB, its size before any resizing, and remarks worth a line in the ledger."""

    image: Pixels
    width: int
    height: int
    format: str
    plain: bool  # 8-bit RGB as stored, so that its bytes may be kept as they are
    remarks: list[tuple[str, str]] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    """Where in `image` the picture is, if it was decoded at a fraction (whose size is rounded up)."""


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
    box = None if part == 1 else _box(orientation, width / part, height / part, image.size)
    width, height = upright.size if part == 1 else (height, width) if orientation >= 5 else (width, height)
    plain = (image.mode == "RGB" and part == 1 and orientation in {0, 1} and frames == 1 and not converted
             and "transparency" not in image.info and not _deep_png(image, data))
    rgb.info = {}  # else `encode` would write comments, and profiles that hold no more
    decoded = Decoded(rgb, width, height, (image.format or "").lower(), plain, box=box)
    if frames > 1:
        decoded.remarks.append(("animated", f"first of {frames} frames taken"))
    if complaint:
        decoded.remarks.append(("bad_profile", complaint))
    return decoded


def _quickly(image: Image.Image, data: bytes, size: int, how: Resize) -> Decoded | None:
    """What most pictures on the web are, a JPEG of three colours to be made smaller; None for any other."""
    (width, height), part = image.size, _fraction(image, size, how)
    side = max(width, height) if how in _LONG_SIDE else min(width, height)
    if image.format != "JPEG" or image.mode != "RGB" or how == "no" or side <= size:
        return None
    profile = image.info.get("icc_profile")
    if profile and (not isinstance(profile, bytes) or len(profile) > _LARGEST_PROFILE
                    or _transform(profile) != ("RGB", None, "")):
        return None
    stored = (-(-width // part), -(-height // part))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=stored[0], min_height=stored[1])
    except ValueError:
        return None  # Pillow tells what is wrong, and forgives what can be forgiven
    if pixels.shape != (stored[1], stored[0], 3):
        return None
    orientation = _orientation(image)
    box = _box(orientation, width / part, height / part, stored)
    if orientation >= 5:
        width, height = height, width
    return Decoded(_upright(pixels, orientation), width, height, "jpeg", plain=False, box=box)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as the EXIF orientation wants them, without a copy."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down, right = orientation in {3, 4, 7, 8}, orientation in {2, 3, 6, 7}
    return pixels[::-1 if down else 1, ::-1 if right else 1]


def _fraction(image: Image.Image, size: int, how: Resize) -> int:
    """1, 2, 4 or 8: at which part of its size libjpeg may decode, so that `resize` still has enough to choose from."""
    if image.format not in {"JPEG", "MPO"}:
        return 1
    side = max(image.size) if how in _LONG_SIDE else min(image.size)
    # Colours that are coarser one way than the other do not come out even from a small fraction (32 dB).
    most = 8 if all(across == down for _, across, down, _ in getattr(image, "layer", ())) else 2
    return next((part for part in (8, 4, 2)
                 if part <= most and side >= part * SPARE * size and min(image.size) >= part), 1)


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


def resize(image: Pixels | Decoded, size: int, how: Resize, *, only_if_bigger: bool = False,
           max_aspect: float = NARROWEST) -> Pixels:
    """Resize with Lanczos (a = 3), in one step from the part that is wanted; Pillow's images give Pillow's.

    center_crop: the middle square at `size`; keep_ratio: the short side; keep_ratio_largest: the long side; border:
    the long side, and white around it to a square; no: as it is. With `only_if_bigger` nothing is enlarged: the side
    in question stays below `size`. Squares remain squares then: center_crop takes the middle at its own size, border
    adds white up to `size` (img2dataset leaves such pictures neither cropped nor padded).
    What needs no change is returned itself. BadPicture with the reason too_narrow beyond `max_aspect`, or where a
    hair's breadth would be blown up to a giant.
    """
    box = None
    if isinstance(image, Decoded):
        box, (width, height), image = image.box, (image.width, image.height), image.image
    else:
        width, height = size_of(image)
    if how == "no":
        return image
    check(width, height, 0, max_aspect)
    side = max(width, height) if how in _LONG_SIDE else min(width, height)
    wanted = min(size, side) if only_if_bigger else size
    scale = wanted / side
    smallest = 1 if how in _LONG_SIDE else wanted
    shape = (max(smallest, round(width * scale)), max(smallest, round(height * scale)))
    if max(shape) > LONGEST:
        raise BadPicture("too_narrow", f"{width} x {height} would become {shape[0]} x {shape[1]}")
    if how == "center_crop":
        # The middle of what the whole would become, by whole pixels.
        left, top = (shape[0] - wanted) // 2, (shape[1] - wanted) // 2
        square = (left, top, left + wanted, top + wanted)
        if wanted == side and box is None:
            return image if width == height else _crop(image, square)
        x, y = width / shape[0], height / shape[1]
        part = (left * x, top * y, square[2] * x, square[3] * y)
        return _lanczos(image, (wanted, wanted), part, (width, height), box)
    if shape != size_of(image) or box is not None:
        image = _lanczos(image, shape, (0, 0, width, height), (width, height), box)
    if how == "border" and shape != (size, size):
        left, top = (size - shape[0]) // 2, (size - shape[1]) // 2
        if isinstance(image, Image.Image):
            white = Image.new("RGB", (size, size), "white")
            white.paste(image, (left, top))
            return white
        square_ = np.full((size, size, 3), 255, np.uint8)
        square_[top:top + shape[1], left:left + shape[0]] = image
        return square_
    return image


def size_of(image: Pixels) -> tuple[int, int]:
    """Width and height."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _crop(image: Pixels, part: tuple[int, int, int, int]) -> Pixels:
    left, top, right, bottom = part
    return image.crop(part) if isinstance(image, Image.Image) else image[top:bottom, left:right]


def _lanczos(image: Pixels, shape: tuple[int, int], part: tuple[float, float, float, float],
             whole: tuple[int, int], box: tuple[float, float, float, float] | None) -> Pixels:
    """`part` of a picture of the size `whole`, that lies at `box` of `image`, in `shape` pixels."""
    width, height = size_of(image)
    if box is not None:
        x, y = (box[2] - box[0]) / whole[0], (box[3] - box[1]) / whole[1]
        part = (box[0] + part[0] * x, box[1] + part[1] * y, box[0] + part[2] * x, box[1] + part[3] * y)
        part = (max(part[0], 0), max(part[1], 0), min(part[2], width), min(part[3], height))
    if isinstance(image, Image.Image):
        # Four times and more too large: averaged by whole pixels first (47 dB and more against none of it).
        return image.resize(shape, Image.Resampling.LANCZOS, box=part, reducing_gap=2.0)
    return resampled(image, shape, part, "lanczos")


def resampled(pixels: np.ndarray, shape: tuple[int, int], part: tuple[float, float, float, float],
              kernel: Kernel) -> np.ndarray:
    """`part` (left, top, right, bottom) of (H, W, 3) uint8 in `shape` (width, height), as Pillow would have it.

    All kernels are as wide as the step from pixel to pixel when they make smaller (antialiased); bicubic has a = -0.5.
    """
    # What enlarges with bicubic overshoots, and who rounds when shows in the result.
    enlarged = shape[0] > part[2] - part[0] or shape[1] > part[3] - part[1]
    if Resizer is None or (kernel == "bicubic" and enlarged):
        return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling[kernel.upper()], box=part))
    height, width = pixels.shape[:2]
    source = ImageData(width, height, PixelType.U8x3, pixels.tobytes())
    target = ImageData(*shape, PixelType.U8x3)
    left, top = part[:2]
    # A hair less than all: what is outside by the last bit of a float is refused.
    across, down = (min(part[2], width * _INSIDE) - left, min(part[3], height * _INSIDE) - top)
    Resizer().resize(source, target, ResizeOptions(ResizeAlg.convolution(_KERNELS[kernel]),
                                                   crop_box=CropBox(left, top, across, down)))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(shape[1], shape[0], 3)


def encode(image: Pixels, format_: Format, quality: int) -> bytes:
    """The bytes of `image` as jpg, png or webp; BadPicture with the reason too_large where the format has no room."""
    if max(size_of(image)) > _LONGEST.get(format_, 1 << 31):
        raise BadPicture("too_large", "{} x {}, {} ends at {}".format(*size_of(image), format_, _LONGEST[format_]))
    if format_ == "jpg":
        # As Pillow does it, which keeps all other threads waiting meanwhile.
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420", fastdct=False)
    buffer = io.BytesIO()
    if format_ == "png":
        _pillow(image).save(buffer, "PNG")
    else:
        _pillow(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _pillow(image: Pixels) -> Image.Image:
    """As an image of Pillow's, in RGB."""
    if not isinstance(image, Image.Image):
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels(data: bytes) -> np.ndarray:
    """The picture of a shard as (H, W, 3) uint8; BadPicture if it does not decode."""
    if data[:3] == _JPEG:  # of the usual kind in half of Pillow's time, and without keeping other threads waiting
        try:
            _, _, space, _ = simplejpeg.decode_jpeg_header(data)
            if space == "YCbCr" and b"Exif\0" not in data[:1 << 16] and b"ICC_PROFILE" not in data[:1 << 16]:
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # Pillow tells what is wrong, and forgives what can be forgiven
    return np.asarray(decode(data, max_pixels=1 << 40, max_aspect=float("inf")).image)


def patches(image: Pixels, size: int, count: int, seed: int, key: str) -> list[tuple[int, int, Pixels]]:
    """`count` squares of `size` cut at random from `image`: left, top, and the square.

    Where is a function of (seed, key, number of the square) and nothing else, every place as likely as any other.
    BadPicture with the reason too_small if there is no room.
    """
    width, height = size_of(image)
    if min(width, height) < size:
        raise BadPicture("too_small", f"{width} x {height}, less than a patch of {size}")
    result = []
    for number in range(count):
        drawn = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogateescape")).digest()
        # 128 bits each: what the remainder prefers is beyond measure.
        left = int.from_bytes(drawn[:16], "big") % (width - size + 1)
        top = int.from_bytes(drawn[16:], "big") % (height - size + 1)
        result.append((left, top, _crop(image, (left, top, left + size, top + size))))
    return result


def pixel_hash(image: Pixels) -> str:
    """sha256 of size and pixels as RGB: equal for equal pictures, however they were encoded."""
    digest = hashlib.sha256(b"%d %d\n" % size_of(image))
    digest.update((image if isinstance(image, np.ndarray) else _pillow(image)).tobytes())
    return digest.hexdigest()


def perceptual_hash(image: Pixels) -> tuple[int, tuple[int, int, int]]:
    """pHash (64 bits, the same but for a few bits for a copy scaled or encoded anew), and the mean colour.

    pHash sees luminance alone, without its level: a red square and a blue one, a blank picture and any other have the
    same. The mean colour tells these apart.
    """
    import imagehash  # loads scipy

    rgb = _pillow(image)
    bits = imagehash.phash(rgb).hash.flatten()
    mean = rgb.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), mean  # type: ignore[return-value]
