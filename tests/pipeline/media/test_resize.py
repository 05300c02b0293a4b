"""Resizing, cropping, patches and encoding."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.media.decode import decode
from pipeline.media.resize import cut_patches, decode_pixels, encode, resize
from pipeline.media.types import BadImage, size_of
from tests.pipeline.media.sample_images import photo, psnr
from tests.pipeline.media.test_decode import turned
from tests.pipeline.synthetic import encoded, noise


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (33, 32), (32, 32), (7, 5), (640, 33)])
def test_resizing_gives_the_requested_size(width, height):
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
def test_a_very_narrow_image_is_refused(how):
    """A file of a few bytes must not become gigabytes."""
    with pytest.raises(BadImage, match="too_narrow"):
        resize(Image.new("RGB", (100_000, 1)), 256, how)
    assert resize(Image.new("RGB", (3200, 32)), 32, how).height == 32


@pytest.mark.parametrize(("image_format", "side"), [("jpg", 70_000), ("webp", 20_000)])
def test_an_image_that_a_format_cannot_hold_has_a_reason(image_format, side):
    with pytest.raises(BadImage, match="too_large"):
        encode(Image.new("RGB", (side, 2)), image_format, 90)


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_encoding_is_deterministic_and_close_to_the_pixels(image_format):
    smooth = noise(8, 8).resize((64, 64), Image.Resampling.BICUBIC)
    data = encode(smooth, image_format, 95)
    assert data == encode(smooth, image_format, 95)
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (64, 64)
    assert np.abs(decode_pixels(data).astype(int) - np.asarray(smooth)).mean() < (0.01 if image_format == "png" else 6)


@pytest.mark.parametrize("how", ["center_crop", "keep_ratio", "keep_ratio_largest", "border"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_fraction_gives_the_same_image(orientation, how):
    """No fraction divides these sides. An error of half a pixel of the fraction would be below 40 dB."""
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


def test_decoding_at_a_fraction_leaves_enough_pixels():
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
def test_resizing_by_the_long_side_adds_a_border(width, height):
    picture = photo(width + 20, height + 20).crop((0, 0, width, height))
    kept = resize(picture, 32, "keep_ratio_largest")
    scale = 32 / max(width, height)
    assert kept.size == (max(1, round(width * scale)), max(1, round(height * scale)))
    square = np.asarray(resize(picture, 32, "border"))
    left_margin, top_margin = (32 - kept.width) // 2, (32 - kept.height) // 2
    inner = square[top_margin:top_margin + kept.height, left_margin:left_margin + kept.width]
    assert square.shape == (32, 32, 3) and inner.tolist() == np.asarray(kept).tolist()
    assert square.astype(int).sum() == inner.astype(int).sum() + 255 * 3 * (32 * 32 - kept.width * kept.height)


def test_small_images_are_not_enlarged_if_configured():
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
def test_very_large_images_are_resized_accurately(how):
    picture = photo(1301, 901)
    plain = picture.resize((46, 32), Image.Resampling.LANCZOS)
    shown = resize(picture, 32, how)
    # The crop begins at a fraction of a pixel here, and at a full pixel in the reference.
    expected, least = (plain, 45) if how == "keep_ratio" else (plain.crop((7, 0, 39, 32)), 30)
    assert psnr(shown, expected) > least


def test_patches_are_a_function_of_seed_and_key():
    picture = noise(40, 33)
    patches = cut_patches(picture, 32, 400, 1, "a/b.jpg")
    # These are constants, because patches must be the same on every machine and in every version.
    assert [place[:2] for place in patches[:3]] == [(7, 0), (5, 0), (0, 0)]
    assert [place[:2] for place in cut_patches(picture, 32, 3, 1, "a/b.jpg")] == [(7, 0), (5, 0), (0, 0)]
    assert all(np.asarray(patch).tolist() == np.asarray(picture)[y:y + 32, x:x + 32].tolist()
               for x, y, patch in patches)
    places = np.zeros((9, 2), int)
    for x, y, _ in patches:
        places[x, y] += 1
    assert places.min() >= 8 and places.max() <= 45  # 22 expected at each of 18
    for seed, key in ((2, "a/b.jpg"), (1, "a/c.jpg")):
        assert [place[:2] for place in cut_patches(picture, 32, 9, seed, key)] != [place[:2] for place in patches[:9]]
    assert cut_patches(picture, 33, 1, 0, "")[0][2].size == (33, 33)
    with pytest.raises(BadImage, match="too_small"):
        cut_patches(picture, 34, 1, 0, "")
