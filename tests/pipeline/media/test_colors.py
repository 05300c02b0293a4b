"""Colors: CMYK, 16 bits, transparency, ICC profiles."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.media.decode import decode
from pipeline.media.resize import encode, resize
from pipeline.media.types import BadImage
from tests.pipeline.media.sample_images import decoded, gamma, inks, photo, png, profile, psnr, wide_gamut, xyz
from tests.pipeline.synthetic import encoded, noise


def test_colors_of_cmyk_are_right():
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
def test_16_bit_grays_are_scaled_whether_dark_or_bright(values):
    data = encoded(Image.fromarray(np.array([values], np.uint16)), "PNG")
    expected = np.round(np.array(values) / 65535 * 255)
    assert decoded(data)[0, :, 0].tolist() == expected.tolist()


def test_16_bit_colors_become_8_bit():
    rows = b"".join(b"\0" + struct.pack(">6H", *[0x1234, 0x8000, 0xFFFF] * 2) for _ in range(2))
    deep = decode(png(2, 2, 16, 2, rows), 100)
    assert np.abs(np.asarray(deep.image)[0, 0].astype(int) - [0x12, 0x80, 0xFF]).max() <= 1
    assert not deep.plain


def test_one_bit_and_float_images_keep_white():
    bits = Image.new("1", (4, 4))
    bits.putpixel((1, 1), 1)
    assert decoded(encoded(bits, "PNG"))[1, 1].tolist() == [255, 255, 255]
    ramp = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decoded(encoded(ramp, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [np.float32([0, 65535]), np.float32([-1, 1]), np.float32([0.5, np.nan]),
                                    np.float32([0, np.inf]), np.int32([0, 1 << 30]), np.int32([-5, 200])])
def test_numbers_of_an_unknown_range_are_no_image(values):
    with pytest.raises(BadImage, match=r"corrupt: its numbers go from .* to .*, expected 0 to "):
        decode(encoded(Image.fromarray(values[None]), "TIFF"), 100)


def p3_as_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    """The expected colors follow the standard: gamma 2.2, primaries, the curve of sRGB."""
    linear = np.array(colour) / 255
    p3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    rgb = (np.linalg.inv(srgb) @ p3 @ linear ** 2.2).clip(0, 1)
    return np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("colour", [(200, 100, 50), (255, 0, 0), (128, 128, 128), (30, 160, 220)])
def test_wide_colors_become_srgb(kind, colour):
    options = {"lossless": True} if kind == "WEBP" else {} if kind in {"PNG", "TIFF"} else {"quality": 100}
    flat = Image.new("RGB", (32, 32), colour)
    picture = decode(encoded(flat, kind, icc_profile=wide_gamut(), **options), 2000)
    assert np.abs(np.asarray(picture.image)[16, 16] - p3_as_srgb(colour)).max() <= (2 if kind in {"PNG", "TIFF"} else 5)
    assert not picture.plain and picture.remarks == []
    assert "icc_profile" not in Image.open(io.BytesIO(encode(picture.image, "png", 0))).info
    small = decode(encoded(Image.new("RGB", (99, 99), colour), "JPEG", quality=100, icc_profile=wide_gamut()),
                   10_000, at_least=32)
    assert np.abs(np.asarray(small.image)[16, 16] - p3_as_srgb(colour)).max() <= 5 and small.image.width == 50


def test_srgb_profiles_of_any_name_change_nothing():
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


def test_profiles_of_grays_and_inks_are_applied():
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
def test_a_broken_profile_is_noted_and_ignored(broken):
    picture = decode(encoded(noise(8, 8), "TIFF", icc_profile=broken), 100)
    assert [remark for remark, _ in picture.remarks] == ["bad_profile"]
    assert np.asarray(picture.image).tolist() == np.asarray(noise(8, 8)).tolist()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_colors_subsampled_in_one_direction_stay_right(subsampling):
    picture = photo(1203, 805)
    data = encoded(picture, "JPEG", quality=95, subsampling=subsampling)
    for size in (64, 128, 256):
        small = resize(decode(data, 10_000_000, at_least=size, how="keep_ratio"), size, "keep_ratio")
        whole = resize(decode(data, 10_000_000), size, "keep_ratio")
        assert psnr(small, whole) > 42
