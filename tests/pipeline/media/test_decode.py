"""Decoding: each image is decoded upright in 8-bit RGB, or has a named reason."""

import random

import numpy as np
import pytest
from PIL import Image

from pipeline.media.decode import decode
from pipeline.media.resize import decode_pixels, resize
from pipeline.media.types import BadImage, check_size, size_of
from tests.pipeline.media.sample_images import decoded, png, reason, wide_gamut
from tests.pipeline.synthetic import encoded, noise


def test_every_undecodable_image_has_a_reason():
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
def test_damaged_bytes_give_an_image_or_a_reason(kind, capfd):
    """A decoder has no other result for any bytes."""
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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_decoded(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), 1000)
    assert np.asarray(picture.image)[8, 8].tolist() == [255, 0, 0]
    assert picture.remarks == [("animated", "first of 3 frames taken")] and not picture.plain


def turned(upright: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it with `orientation`."""
    inverse = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
               4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
               7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}.get(orientation)
    return upright.transpose(inverse) if inverse is not None else upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))  # upper left
    picture = decode(encoded(turned(upright, orientation), "PNG", exif=exif), 1000)
    assert (picture.width, picture.height) == (24, 16)
    assert np.asarray(picture.image).tolist() == np.asarray(upright).tolist()
    assert not picture.plain or orientation == 1


def test_only_rgb_files_without_changes_are_plain():
    assert decode(encoded(noise(8, 8), "PNG"), 100).plain
    assert decode(encoded(noise(8, 8), "JPEG"), 100).plain
    for other in ("L", "P", "RGBA", "1"):
        assert not decode(encoded(noise(8, 8).convert(other), "PNG"), 100).plain


def test_small_and_narrow_images_are_refused_by_their_header():
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


def test_a_damaged_exif_block_does_not_change_the_image():
    assert decode(encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0no TIFF at all"), 100).plain


def test_a_file_that_is_no_image_is_not_executed():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason(postscript) == "not_a_picture"
