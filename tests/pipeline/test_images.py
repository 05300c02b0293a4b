import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from tests.pipeline.made import encoded, noise


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand; `rows` are unfiltered, or nothing for a file that ends after its header."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    body = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
            + body + chunk(b"IEND", b""))


def decoded(data: bytes, max_pixels: int = 10_000_000) -> np.ndarray:
    return np.asarray(images.decode(data, max_pixels).image)


def reason(data: bytes, max_pixels: int = 10_000_000) -> str:
    with pytest.raises(images.BadPicture) as caught:
        images.decode(data, max_pixels)
    return caught.value.reason


def test_what_is_wrong_has_a_name():
    jpeg = encoded(noise(64, 64), "JPEG")
    assert reason(b"") == "empty_file"
    assert reason(b"this is no picture") == "not_a_picture"
    assert reason(jpeg[:len(jpeg) // 2]) == "corrupt"
    assert reason(encoded(noise(64, 64), "PNG")[:-2000]) == "corrupt"
    assert reason(png(50_000, 50_000, 8, 2, b"")) == "too_many_pixels"
    assert reason(encoded(Image.new("1", (3000, 3000)), "PNG"), max_pixels=8_999_999) == "too_many_pixels"
    assert decoded(encoded(Image.new("1", (3000, 3000)), "PNG"), max_pixels=9_000_000).shape == (3000, 3000, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_spoiled_bytes_give_a_picture_or_a_reason(kind, capfd):
    """Nothing else may come out of a decoder, whatever the bytes."""
    chance = random.Random(kind)
    frames = [noise(24, 20, seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": frames[1:]} if kind in {"GIF", "WEBP", "PNG"} else {}
    tagged = {} if kind == "BMP" else {"exif": exif}
    for whole in (encoded(frames[0], kind, **more), encoded(frames[0], kind, **tagged)):
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 2, 8])):
                data[chance.randrange(min(len(data), chance.choice([40, 400, 10_000])))] = chance.randrange(256)
            end = chance.choice([len(data), chance.randrange(len(data))])
            try:
                assert images.decode(bytes(data[:end]), 10_000).image.mode == "RGB"
            except images.BadPicture as bad:
                assert bad.reason in {"empty_file", "not_a_picture", "too_many_pixels", "corrupt"}


def test_colours_of_cmyk_are_right():
    solid = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}
    for colour, rgb in solid.items():
        cmyk = Image.new("RGB", (32, 32), colour).convert("CMYK")
        assert np.abs(decoded(encoded(cmyk, "JPEG", quality=95)).astype(int) - rgb).max() <= 4


def test_transparent_parts_are_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    shown = decoded(encoded(palette, "PNG", transparency=0))
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[1, 1].tolist() == [0, 0, 255]
    half = decoded(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))
    assert half[0, 0].tolist() == [127, 127, 127]
    assert decoded(encoded(Image.new("LA", (2, 2), (0, 0)), "PNG"))[0, 0].tolist() == [255, 255, 255]
    assert decoded(encoded(Image.new("LA", (2, 2), (9, 255)), "PNG"))[0, 0].tolist() == [9, 9, 9]
    keyed = Image.new("RGB", (2, 2), (1, 2, 3))
    keyed.putpixel((0, 0), (9, 9, 9))
    shown = images.decode(encoded(keyed, "PNG", transparency=(1, 2, 3)), 100)
    assert np.asarray(shown.image)[1, 1].tolist() == [255, 255, 255] and not shown.plain
    assert np.asarray(shown.image)[0, 0].tolist() == [9, 9, 9]
    grey = decoded(encoded(Image.new("L", (2, 2), 7), "PNG", transparency=7))
    assert grey[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("values", [[0, 200, 255, 100], [0, 257, 32768, 65535]])
def test_16_bit_greys_are_scaled_whether_dark_or_bright(values):
    data = encoded(Image.fromarray(np.array([values], np.uint16)), "PNG")
    expected = np.round(np.array(values) / 65535 * 255)
    assert decoded(data)[0, :, 0].tolist() == expected.tolist()


def test_16_bit_colours_are_8_bit_and_not_passed_through():
    rows = b"".join(b"\0" + struct.pack(">6H", *[0x1234, 0x8000, 0xFFFF] * 2) for _ in range(2))
    deep = images.decode(png(2, 2, 16, 2, rows), 100)
    assert np.abs(np.asarray(deep.image)[0, 0].astype(int) - [0x12, 0x80, 0xFF]).max() <= 1
    assert not deep.plain


def test_one_bit_and_float_pictures_have_their_whites():
    bits = Image.new("1", (4, 4))
    bits.putpixel((1, 1), 1)
    assert decoded(encoded(bits, "PNG"))[1, 1].tolist() == [255, 255, 255]
    ramp = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decoded(encoded(ramp, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = images.decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), 1000)
    assert np.asarray(picture.image)[8, 8].tolist() == [255, 0, 0]
    assert picture.remarks == [("animated", "first of 3 frames taken")] and not picture.plain


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))  # upper left
    inverse = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
               4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
               7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}.get(orientation)
    stored = upright.transpose(inverse) if inverse is not None else upright
    picture = images.decode(encoded(stored, "PNG", exif=exif), 1000)
    assert (picture.width, picture.height) == (24, 16)
    assert np.asarray(picture.image).tolist() == np.asarray(upright).tolist()
    assert not picture.plain or orientation == 1


def test_only_bytes_that_say_exactly_these_pixels_are_plain():
    assert images.decode(encoded(noise(8, 8), "PNG"), 100).plain
    assert images.decode(encoded(noise(8, 8), "JPEG"), 100).plain
    for other in ("L", "P", "RGBA", "1"):
        assert not images.decode(encoded(noise(8, 8).convert(other), "PNG"), 100).plain


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (33, 32), (32, 32), (7, 5), (640, 33)])
def test_resizing_gives_the_size_that_was_asked(width, height):
    picture = noise(width, height)
    assert images.resize(picture, 32, "center_crop").size == (32, 32)
    kept = images.resize(picture, 32, "keep_ratio")
    assert min(kept.size) == 32
    assert max(kept.size) == max(32, round(max(width, height) * 32 / min(width, height)))
    assert images.resize(picture, 32, "no") is picture


def test_the_crop_is_the_middle():
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("red", (30, 0, 60, 30))
    assert np.asarray(images.resize(wide, 30, "center_crop")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 900
    high = wide.transpose(Image.Transpose.ROTATE_90)
    assert np.asarray(images.resize(high, 30, "center_crop")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 900


@pytest.mark.parametrize("how", ["center_crop", "keep_ratio"])
def test_a_hairline_is_not_blown_up(how):
    """A file of a few bytes must not become gigabytes."""
    with pytest.raises(images.BadPicture, match="too_narrow"):
        images.resize(Image.new("RGB", (100_000, 1)), 256, how)
    assert images.resize(Image.new("RGB", (3200, 32)), 32, how).height == 32


@pytest.mark.parametrize(("format_", "side"), [("jpg", 70_000), ("webp", 20_000)])
def test_what_a_format_has_no_room_for_has_a_name(format_, side):
    with pytest.raises(images.BadPicture, match="too_large"):
        images.encode(Image.new("RGB", (side, 2)), format_, 90)


@pytest.mark.parametrize("format_", ["jpg", "png", "webp"])
def test_encoding_is_deterministic_and_near(format_):
    smooth = noise(8, 8).resize((64, 64), Image.Resampling.BICUBIC)
    data = images.encode(smooth, format_, 95)
    assert data == images.encode(smooth, format_, 95)
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (64, 64)
    assert np.abs(images.pixels(data).astype(int) - np.asarray(smooth)).mean() < (0.01 if format_ == "png" else 6)
