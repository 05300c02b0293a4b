"""Resize, crop and encode images."""

import hashlib
import io

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.media import image_headers, isolation, jpeg_damage
from pipeline.media.decode import decode
from pipeline.media.types import (
    JPEG_MAGIC,
    LONG_SIDE_MODES,
    LONGEST,
    NARROWEST,
    BadImage,
    Decoded,
    Format,
    Kernel,
    Pixels,
    Resize,
    check_size,
    size_of,
)

try:
    from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
except ImportError:  # no wheel for this machine; Pillow does the same, and takes its time
    Resizer = None
_KERNELS = {} if Resizer is None else {"lanczos": FilterType.lanczos3, "bicubic": FilterType.catmull_rom,
                                         "bilinear": FilterType.bilinear}
_LONGEST = {"jpg": 65500, "webp": 16383}
_INSIDE = 1 - 2 ** -50


def resize(image: "Pixels | Decoded", size: int, how: Resize, *, only_if_bigger: bool = False,
           max_aspect: float = NARROWEST) -> Pixels:
    """Resize with Lanczos (a = 3), in one step from the wanted part. Images of Pillow stay images of Pillow.

    * center_crop: the middle square at `size`
    * keep_ratio: the short side at `size`
    * keep_ratio_largest: the long side at `size`
    * border: the long side at `size`, with white around it to a square
    * no: unchanged

    `only_if_bigger` enlarges nothing. Then center_crop takes the middle square in its size, and border adds white up
    to `size`. img2dataset does neither. An image that needs no change is returned itself. BadImage with the reason
    too_narrow beyond `max_aspect`, or if a few pixels would become a huge image.
    """
    box = None
    if isinstance(image, Decoded):
        box, (width, height), image = image.box, (image.width, image.height), image.image
    else:
        width, height = size_of(image)
    if how == "no":
        return image
    check_size(width, height, 0, max_aspect)
    side = max(width, height) if how in LONG_SIDE_MODES else min(width, height)
    wanted = min(size, side) if only_if_bigger else size
    scale = wanted / side
    smallest = 1 if how in LONG_SIDE_MODES else wanted
    shape = (max(smallest, round(width * scale)), max(smallest, round(height * scale)))
    if max(shape) > LONGEST:
        raise BadImage("too_narrow", f"{width} x {height} would become {shape[0]} x {shape[1]}")
    if how == "center_crop":
        # The middle of what the whole would become, by whole pixels.
        crop_x, crop_y = (shape[0] - wanted) // 2, (shape[1] - wanted) // 2
        square = (crop_x, crop_y, crop_x + wanted, crop_y + wanted)
        if wanted == side and box is None:
            return image if width == height else _crop(image, square)
        x_scale, y_scale = width / shape[0], height / shape[1]
        part = (crop_x * x_scale, crop_y * y_scale, square[2] * x_scale, square[3] * y_scale)
        return _lanczos(image, (wanted, wanted), part, (width, height), box)
    if shape != size_of(image) or box is not None:
        image = _lanczos(image, shape, (0, 0, width, height), (width, height), box)
    if how == "border" and shape != (size, size):
        x, y = (size - shape[0]) // 2, (size - shape[1]) // 2
        if isinstance(image, Image.Image):
            white = Image.new("RGB", (size, size), "white")
            white.paste(image, (x, y))
            return white
        canvas = np.full((size, size, 3), 255, np.uint8)
        canvas[y:y + shape[1], x:x + shape[0]] = image
        return canvas
    return image


def _crop(image: Pixels, part: tuple[int, int, int, int]) -> Pixels:
    x_start, y_start, x_stop, y_stop = part
    return image.crop(part) if isinstance(image, Image.Image) else image[y_start:y_stop, x_start:x_stop]


def _lanczos(image: Pixels, shape: tuple[int, int], part: tuple[float, float, float, float],
             whole: tuple[int, int], box: tuple[float, float, float, float] | None) -> Pixels:
    """`part` of an image of the size `whole`, that lies at `box` of `image`, in `shape` pixels."""
    width, height = size_of(image)
    if box is not None:
        x_scale, y_scale = (box[2] - box[0]) / whole[0], (box[3] - box[1]) / whole[1]
        part = (box[0] + part[0] * x_scale, box[1] + part[1] * y_scale,
                box[0] + part[2] * x_scale, box[1] + part[3] * y_scale)
        part = (max(part[0], 0), max(part[1], 0), min(part[2], width), min(part[3], height))
    if isinstance(image, Image.Image):
        # Four times and more too large: averaged by whole pixels first (47 dB and more against none of it).
        return image.resize(shape, Image.Resampling.LANCZOS, box=part, reducing_gap=2.0)
    return resample(image, shape, part, "lanczos")


def resample(pixels: np.ndarray, shape: tuple[int, int], part: tuple[float, float, float, float],
              kernel: Kernel) -> np.ndarray:
    """`part` (left, top, right, bottom) of (H, W, 3) uint8 in `shape` (width, height), as Pillow would have it.

    All kernels are as wide as the step from pixel to pixel when they make smaller (antialiased); bicubic has a = -0.5.
    """
    # Enlarging with bicubic overshoots, and the result depends on when a library rounds.
    enlarged = shape[0] > part[2] - part[0] or shape[1] > part[3] - part[1]
    if Resizer is None or (kernel == "bicubic" and enlarged):
        return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling[kernel.upper()], box=part))
    height, width = pixels.shape[:2]
    source = ImageData(width, height, PixelType.U8x3, pixels.tobytes())
    target = ImageData(*shape, PixelType.U8x3)
    x, y = part[:2]
    # Slightly less than all: the library refuses a box that is outside by one bit.
    crop_width, crop_height = (min(part[2], width * _INSIDE) - x, min(part[3], height * _INSIDE) - y)
    Resizer().resize(source, target, ResizeOptions(ResizeAlg.convolution(_KERNELS[kernel]),
                                                   crop_box=CropBox(x, y, crop_width, crop_height)))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(shape[1], shape[0], 3)


def encode(image: Pixels, image_format: Format, quality: int) -> bytes:
    """The bytes of `image` as jpg, png or webp; BadImage with the reason too_large where the format has no room."""
    if max(size_of(image)) > _LONGEST.get(image_format, 1 << 31):
        width, height = size_of(image)
        raise BadImage("too_large", f"{width} x {height}, {image_format} ends at {_LONGEST[image_format]}")
    if image_format == "jpg":
        # As Pillow does it, which keeps all other threads waiting meanwhile.
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420", fastdct=False)
    buffer = io.BytesIO()
    if image_format == "png":
        to_pillow(image).save(buffer, "PNG")
    else:
        to_pillow(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def to_pillow(image: Pixels) -> Image.Image:
    """As an image of Pillow's, in RGB."""
    if not isinstance(image, Image.Image):
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_pixels(data: bytes) -> np.ndarray:
    """The image of a shard as (H, W, 3) uint8; BadImage if it does not decode."""
    # A JPEG of the usual kind: in half of Pillow's time, and without keeping other threads waiting.
    if data[:3] == JPEG_MAGIC and not image_headers.is_suspicious(data):
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if (space == "YCbCr" and width * height <= isolation.MOST_PIXELS
                    and b"Exif\0" not in data[:1 << 16] and b"ICC_PROFILE" not in data[:1 << 16]):
                return jpeg_damage.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # Pillow tells what is wrong, and forgives what can be forgiven
    return np.asarray(decode(data, max_pixels=1 << 40, max_aspect=float("inf")).image)


def cut_patches(image: Pixels, size: int, count: int, seed: int, key: str) -> list[tuple[int, int, Pixels]]:
    """`count` squares of `size` cut at random from `image`: x and y of the upper left corner, and the square.

    The place depends only on (seed, key, number of the square). All places are equally likely.
    BadImage with the reason too_small if there is no room.
    """
    width, height = size_of(image)
    if min(width, height) < size:
        raise BadImage("too_small", f"{width} x {height}, less than a patch of {size}")
    result = []
    for number in range(count):
        digest = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogateescape")).digest()
        # 128 bits each: what the remainder prefers is beyond measure.
        x = int.from_bytes(digest[:16], "big") % (width - size + 1)
        y = int.from_bytes(digest[16:], "big") % (height - size + 1)
        result.append((x, y, _crop(image, (x, y, x + size, y + size))))
    return result
