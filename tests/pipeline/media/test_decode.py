import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from pipeline.media.decode import decode
from pipeline.media.hashes import perceptual_hash, pixel_hash
from pipeline.media.resize import cut_patches, decode_pixels, encode, resize
from pipeline.media.types import BadImage, check_size, size_of
from tests.pipeline.synthetic import encoded, noise


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand; `rows` are unfiltered, or nothing for a file that ends after its header."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    body = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
            + body + chunk(b"IEND", b""))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) made by hand; `tags` are whole, their type included."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(4) + b"none\0",
            b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"made\0" + bytes(78)} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    kind, pcs = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, kind, space, pcs) + bytes(12) + b"acsp"
    return (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def wide_gamut(power: float = 2.2) -> bytes:
    """Display P3's primaries."""
    return profile(b"RGB ", {b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
                             b"bXYZ": xyz(0.1571, 0.0666, 0.7841)} | {name: gamma(power)
                                                                      for name in (b"rTRC", b"gTRC", b"bTRC")})


def inks() -> bytes:
    """A press whose ink lowers the lightness alone, evenly: any of them, for the colour printed is grey."""
    ramp = bytes(range(256))
    clut = b"".join(bytes([round(255 * (1 - sum(corner) / 4)), 128, 128])
                    for corner in np.ndindex(2, 2, 2, 2))
    matrix = struct.pack(">9i", *(65536 if number % 4 == 0 else 0 for number in range(9)))
    return profile(b"CMYK", {b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + clut + ramp * 3})


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with soft and hard edges, and some noise."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(soft)
    for _ in range(25):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        shape = (left, top, left + int(rng.integers(4, width // 3)), top + int(rng.integers(4, height // 3)))
        draw.ellipse(shape, fill=tuple(map(int, rng.integers(0, 256, 3))))
    grain = np.asarray(soft) + rng.normal(0, 3, (height, width, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float(10 * np.log10(255 ** 2 / max(error, 1e-9)))


def decoded(data: bytes, max_pixels: int = 10_000_000) -> np.ndarray:
    return np.asarray(decode(data, max_pixels).image)


def reason(data: bytes, max_pixels: int = 10_000_000) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, max_pixels)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_spoiled_bytes_give_a_picture_or_a_reason(kind, capfd):
    """Nothing else may come out of a decoder, whatever the bytes."""
    chance = random.Random(kind)
    frames = [noise(24, 20, seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": frames[1:]} if kind in {"GIF", "WEBP", "PNG"} else {}
    tagged = {} if kind == "BMP" else {"exif": exif} if kind == "GIF" else {"exif": exif, "icc_profile": wide_gamut()}
    for whole in (encoded(frames[0], kind, **more), encoded(frames[0], kind, **tagged)):
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 2, 8])):
                data[chance.randrange(min(len(data), chance.choice([40, 400, 10_000])))] = chance.randrange(256)
            end = chance.choice([len(data), chance.randrange(len(data))])
            try:
                picture = decode(bytes(data[:end]), 10_000, at_least=chance.choice([0, 5]))
                assert np.asarray(picture.image).shape[2:] == (3,)
                resized = resize(picture, 5, chance.choice(["center_crop", "keep_ratio"]))
                assert min(size_of(resized)) == 5
            except BadImage as bad:
                assert bad.reason in {"empty_file", "not_a_picture", "too_many_pixels", "corrupt", "too_narrow"}


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
    shown = decode(encoded(keyed, "PNG", transparency=(1, 2, 3)), 100)
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
    deep = decode(png(2, 2, 16, 2, rows), 100)
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
    picture = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), 1000)
    assert np.asarray(picture.image)[8, 8].tolist() == [255, 0, 0]
    assert picture.remarks == [("animated", "first of 3 frames taken")] and not picture.plain


def turned(upright: Image.Image, orientation: int) -> Image.Image:
    """As a camera stores it that notes `orientation`."""
    inverse = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
               4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
               7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}.get(orientation)
    return upright.transpose(inverse) if inverse is not None else upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))  # upper left
    picture = decode(encoded(turned(upright, orientation), "PNG", exif=exif), 1000)
    assert (picture.width, picture.height) == (24, 16)
    assert np.asarray(picture.image).tolist() == np.asarray(upright).tolist()
    assert not picture.plain or orientation == 1


def test_only_bytes_that_say_exactly_these_pixels_are_plain():
    assert decode(encoded(noise(8, 8), "PNG"), 100).plain
    assert decode(encoded(noise(8, 8), "JPEG"), 100).plain
    for other in ("L", "P", "RGBA", "1"):
        assert not decode(encoded(noise(8, 8).convert(other), "PNG"), 100).plain


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (33, 32), (32, 32), (7, 5), (640, 33)])
def test_resizing_gives_the_size_that_was_asked(width, height):
    picture = noise(width, height)
    assert resize(picture, 32, "center_crop").size == (32, 32)
    kept = resize(picture, 32, "keep_ratio")
    assert min(kept.size) == 32
    assert max(kept.size) == max(32, round(max(width, height) * 32 / min(width, height)))
    assert resize(picture, 32, "no") is picture


def test_the_crop_is_the_middle():
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("red", (30, 0, 60, 30))
    assert np.asarray(resize(wide, 30, "center_crop")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 900
    high = wide.transpose(Image.Transpose.ROTATE_90)
    assert np.asarray(resize(high, 30, "center_crop")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 900


@pytest.mark.parametrize("how", ["center_crop", "keep_ratio"])
def test_a_hairline_is_not_blown_up(how):
    """A file of a few bytes must not become gigabytes."""
    with pytest.raises(BadImage, match="too_narrow"):
        resize(Image.new("RGB", (100_000, 1)), 256, how)
    assert resize(Image.new("RGB", (3200, 32)), 32, how).height == 32


@pytest.mark.parametrize(("format_", "side"), [("jpg", 70_000), ("webp", 20_000)])
def test_what_a_format_has_no_room_for_has_a_name(format_, side):
    with pytest.raises(BadImage, match="too_large"):
        encode(Image.new("RGB", (side, 2)), format_, 90)


@pytest.mark.parametrize("format_", ["jpg", "png", "webp"])
def test_encoding_is_deterministic_and_near(format_):
    smooth = noise(8, 8).resize((64, 64), Image.Resampling.BICUBIC)
    data = encode(smooth, format_, 95)
    assert data == encode(smooth, format_, 95)
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (64, 64)
    assert np.abs(decode_pixels(data).astype(int) - np.asarray(smooth)).mean() < (0.01 if format_ == "png" else 6)


@pytest.mark.parametrize("how", ["center_crop", "keep_ratio", "keep_ratio_largest", "border"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_fraction_gives_the_same_picture(orientation, how):
    """Sides that no fraction divides: a picture off by half a pixel of the fraction is below 40 dB here."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photo(1001, 667)
    data = encoded(turned(upright, orientation), "JPEG", quality=95, exif=exif)
    for size in (80, 200):
        small = decode(data, 10_000_000, at_least=size, how=how)
        assert (small.width, small.height) == (1001, 667) and not small.plain
        assert max(size_of(small.image)) in {-(-1001 // part) for part in (2, 4, 8)}
        whole = resize(decode(data, 10_000_000), size, how)
        shown = resize(small, size, how)
        assert size_of(shown) == whole.size and psnr(shown, whole) > 42


@pytest.mark.parametrize("kind", ["grey", "cmyk", "progressive", "mpo", "plain"])
def test_every_kind_of_jpeg_decodes_at_a_fraction(kind):
    picture = photo(600, 400)
    options = {"quality": 95}
    if kind == "grey":
        picture = picture.convert("L")
    elif kind == "cmyk":
        picture = picture.convert("CMYK")
    elif kind == "progressive":
        options["progressive"] = True
    elif kind == "mpo":
        options |= {"save_all": True, "append_images": [photo(600, 400, 1)]}
    data = encoded(picture, "MPO" if kind == "mpo" else "JPEG", **options)
    small = decode(data, 10_000_000, at_least=128)
    assert size_of(small.image) == (300, 200) and (small.width, small.height) == (600, 400)
    assert isinstance(small.image, np.ndarray) == (kind in {"plain", "progressive"})
    whole = resize(decode(data, 10_000_000), 128, "center_crop")
    assert psnr(resize(small, 128, "center_crop"), whole) > 40


def test_enough_is_left_for_resizing():
    data = encoded(photo(640, 400), "JPEG")
    for size, how, width in ((133, "center_crop", 320), (134, "center_crop", 640), (133, "keep_ratio", 320),
                             (213, "border", 320), (214, "border", 640), (106, "keep_ratio_largest", 160),
                             (30, "no", 640), (0, "center_crop", 640), (1, "center_crop", 80), (33, "keep_ratio", 80)):
        assert size_of(decode(data, 10_000_000, at_least=size, how=how).image)[0] == width
    hairline = encoded(Image.new("RGB", (2000, 3)), "JPEG")
    small = decode(hairline, 10_000_000, at_least=100, how="border", max_aspect=1000)
    assert size_of(resize(small, 100, "border", max_aspect=1000)) == (100, 100)
    assert decode(encoded(photo(640, 400), "PNG"), 10_000_000, at_least=32).image.width == 640


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (33, 32), (32, 32), (7, 5), (640, 33)])
def test_the_long_side_and_the_border(width, height):
    picture = photo(width + 20, height + 20).crop((0, 0, width, height))
    kept = resize(picture, 32, "keep_ratio_largest")
    scale = 32 / max(width, height)
    assert kept.size == (max(1, round(width * scale)), max(1, round(height * scale)))
    square = np.asarray(resize(picture, 32, "border"))
    left, top = (32 - kept.width) // 2, (32 - kept.height) // 2
    inner = square[top:top + kept.height, left:left + kept.width]
    assert square.shape == (32, 32, 3) and inner.tolist() == np.asarray(kept).tolist()
    assert square.astype(int).sum() == inner.astype(int).sum() + 255 * 3 * (32 * 32 - kept.width * kept.height)


def test_small_pictures_are_not_enlarged_if_asked():
    picture = photo(40, 20)
    assert resize(picture, 32, "keep_ratio", only_if_bigger=True) is picture
    assert resize(picture, 40, "keep_ratio_largest", only_if_bigger=True) is picture
    assert resize(picture, 10, "keep_ratio", only_if_bigger=True).size == (20, 10)
    assert resize(picture, 10, "center_crop", only_if_bigger=True).size == (10, 10)
    square = resize(picture, 32, "center_crop", only_if_bigger=True)
    assert np.asarray(square).tolist() == np.asarray(picture)[:, 10:30].tolist()
    padded = np.asarray(resize(picture, 64, "border", only_if_bigger=True))
    assert padded.shape == (64, 64, 3) and padded[22:42, 12:52].tolist() == np.asarray(picture).tolist()
    assert (padded[:22] == 255).all() and (padded[:, 52:] == 255).all()
    assert resize(picture, 32, "border", only_if_bigger=True).size == (32, 32)


@pytest.mark.parametrize("how", ["center_crop", "keep_ratio"])
def test_very_large_pictures_lose_nothing_to_speed(how):
    picture = photo(1301, 901)
    plain = picture.resize((46, 32), Image.Resampling.LANCZOS)
    shown = resize(picture, 32, how)
    # The square is cut at a fraction of a pixel here, and at a whole one there.
    expected, least = (plain, 45) if how == "keep_ratio" else (plain.crop((7, 0, 39, 32)), 30)
    assert psnr(shown, expected) > least


def test_small_and_narrow_pictures_are_refused_on_the_header():
    def refused(data, **limits):
        with pytest.raises(BadImage) as caught:
            decode(data, 10_000_000, **limits)
        return caught.value.reason
    broken = encoded(noise(300, 30), "PNG")[:200]
    assert refused(broken) == "corrupt"
    assert refused(broken, min_size=31) == "too_small"
    assert refused(broken, min_size=30, max_aspect=9.9) == "too_narrow"
    assert refused(broken, min_size=30, max_aspect=10) == "corrupt"
    assert refused(png(100_001, 2, 8, 2, b"")) == "too_many_pixels"
    check_size(10, 20, 10, 2)
    with pytest.raises(BadImage, match="too_narrow"):
        resize(Image.new("RGB", (30, 10)), 8, "border", max_aspect=2.9)
    with pytest.raises(BadImage, match="too_narrow"):
        resize(Image.new("RGB", (3000, 1)), 256, "keep_ratio", max_aspect=1e9)
    assert decode_pixels(encoded(Image.new("RGB", (500, 1)), "PNG")).shape == (1, 500, 3)


def test_a_spoiled_exif_block_does_not_spoil_the_picture():
    assert decode(encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0no TIFF at all"), 100).plain


def test_what_is_no_picture_is_not_executed():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason(postscript) == "not_a_picture"


def p3_as_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    """By the book: gamma 2.2, primaries, the curve of sRGB."""
    linear = np.array(colour) / 255
    p3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    rgb = (np.linalg.inv(srgb) @ p3 @ linear ** 2.2).clip(0, 1)
    return np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("colour", [(200, 100, 50), (255, 0, 0), (128, 128, 128), (30, 160, 220)])
def test_wide_colours_become_srgb(kind, colour):
    options = {"lossless": True} if kind == "WEBP" else {} if kind in {"PNG", "TIFF"} else {"quality": 100}
    flat = Image.new("RGB", (32, 32), colour)
    picture = decode(encoded(flat, kind, icc_profile=wide_gamut(), **options), 2000)
    assert np.abs(np.asarray(picture.image)[16, 16] - p3_as_srgb(colour)).max() <= (2 if kind in {"PNG", "TIFF"} else 5)
    assert not picture.plain and picture.remarks == []
    assert "icc_profile" not in Image.open(io.BytesIO(encode(picture.image, "png", 0))).info
    small = decode(encoded(Image.new("RGB", (99, 99), colour), "JPEG", quality=100, icc_profile=wide_gamut()),
                          10_000, at_least=32)
    assert np.abs(np.asarray(small.image)[16, 16] - p3_as_srgb(colour)).max() <= 5 and small.image.width == 50


def test_srgb_by_whatever_name_is_left_alone():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    srgb = profile(b"RGB ", {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
                             b"bXYZ": xyz(0.1431, 0.0606, 0.7141)}
                   | {name: b"curv" + bytes(4) + struct.pack(">I256H", 256, *(
                       round(65535 * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4))
                       for v in np.arange(256) / 255)) for name in (b"rTRC", b"gTRC", b"bTRC")})
    for same in (own, srgb):
        picture = decode(encoded(noise(16, 16), "PNG", icc_profile=same), 1000)
        assert picture.plain and picture.remarks == []
        assert np.asarray(picture.image).tolist() == np.asarray(noise(16, 16)).tolist()


def test_profiles_of_greys_and_inks():
    dark = profile(b"GRAY", {b"kTRC": gamma(1.0)})
    expected = 1.055 * (100 / 255) ** (1 / 2.4) * 255 - 0.055 * 255
    for mode, colour in (("L", 100), ("LA", (100, 255))):
        picture = decode(encoded(Image.new(mode, (8, 8), colour), "PNG", icc_profile=dark), 100)
        assert np.abs(np.asarray(picture.image)[0, 0] - expected).max() <= 2 and picture.remarks == []
    printed = Image.new("CMYK", (32, 32), (128, 0, 0, 128))
    shown = decode(encoded(printed, "JPEG", quality=100, icc_profile=inks()), 2000)
    assert np.ptp(np.asarray(shown.image)[8, 8]) <= 2 and not shown.plain and shown.remarks == []
    lighter = decode(encoded(Image.new("CMYK", (32, 32), (64, 0, 0, 0)), "JPEG", icc_profile=inks()), 2000)
    assert 60 < np.asarray(shown.image)[8, 8, 0] < np.asarray(lighter.image)[8, 8, 0] < 255
    on_grey = decode(encoded(Image.new("L", (8, 8), 128), "PNG", icc_profile=wide_gamut()), 100)
    assert np.abs(np.asarray(on_grey.image)[0, 0] - p3_as_srgb((128, 128, 128))).max() <= 2


@pytest.mark.parametrize("broken", [b"not a profile", wide_gamut()[:200], inks(), profile(b"GRAY", {}),
                                    profile(b"GRAY", {b"kTRC": gamma(1.8)}), bytes(5 << 20)],
                         ids=["text", "cut", "inks", "empty", "greys", "giant"])
def test_a_broken_profile_is_remarked_on_and_ignored(broken):
    picture = decode(encoded(noise(8, 8), "TIFF", icc_profile=broken), 100)
    assert [remark for remark, _ in picture.remarks] == ["bad_profile"]
    assert np.asarray(picture.image).tolist() == np.asarray(noise(8, 8)).tolist()


def test_patches_are_a_function_of_seed_and_key():
    picture = noise(40, 33)
    cut = cut_patches(picture, 32, 400, 1, "a/b.jpg")
    # Written down, for they must be the same everywhere and ever.
    assert [place[:2] for place in cut[:3]] == [(7, 0), (5, 0), (0, 0)]
    assert [place[:2] for place in cut_patches(picture, 32, 3, 1, "a/b.jpg")] == [(7, 0), (5, 0), (0, 0)]
    assert all(np.asarray(patch).tolist() == np.asarray(picture)[top:top + 32, left:left + 32].tolist()
               for left, top, patch in cut)
    places = np.zeros((9, 2), int)
    for left, top, _ in cut:
        places[left, top] += 1
    assert places.min() >= 8 and places.max() <= 45  # 22 expected at each of 18
    for seed, key in ((2, "a/b.jpg"), (1, "a/c.jpg")):
        assert [place[:2] for place in cut_patches(picture, 32, 9, seed, key)] != [place[:2] for place in cut[:9]]
    assert cut_patches(picture, 33, 1, 0, "")[0][2].size == (33, 33)
    with pytest.raises(BadImage, match="too_small"):
        cut_patches(picture, 34, 1, 0, "")


def test_equal_pixels_have_equal_hashes():
    picture = noise(12, 10)
    assert pixel_hash(picture) == pixel_hash(decode(encoded(picture, "PNG"), 1000).image)
    assert pixel_hash(picture) == pixel_hash(picture.convert("RGBA"))
    flat = Image.new("RGB", (12, 10))
    assert len({pixel_hash(flat), pixel_hash(flat.resize((10, 12))), pixel_hash(picture)}) == 3


def test_near_pictures_have_near_hashes():
    pytest.importorskip("imagehash")
    hashes = [perceptual_hash(photo(200, 150, seed))[0] for seed in range(20)]
    assert min((one ^ other).bit_count() for n, one in enumerate(hashes) for other in hashes[:n]) > 8
    for seed, one in enumerate(hashes):
        copy = decode(encoded(photo(200, 150, seed).resize((140, 105)), "JPEG", quality=80), 100_000).image
        assert (perceptual_hash(copy)[0] ^ one).bit_count() <= 6
    red, blue = (perceptual_hash(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue"))
    assert red[1] == (255, 0, 0) and blue[1] == (0, 0, 255) and 0 <= red[0] < 1 << 64


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_colours_that_are_coarser_one_way_stay_true(subsampling):
    picture = photo(1203, 805)
    data = encoded(picture, "JPEG", quality=95, subsampling=subsampling)
    for size in (64, 128, 256):
        small = resize(decode(data, 10_000_000, at_least=size, how="keep_ratio"), size, "keep_ratio")
        whole = resize(decode(data, 10_000_000), size, "keep_ratio")
        assert psnr(small, whole) > 42
