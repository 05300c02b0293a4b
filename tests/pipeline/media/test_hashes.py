"""Hashes of pixels."""

import itertools

import pytest
from PIL import Image

from pipeline.media.decode import decode
from pipeline.media.hashes import perceptual_hash, pixel_hash
from tests.pipeline.media.sample_images import photo
from tests.pipeline.synthetic import encoded, noise


def test_equal_pixels_have_equal_hashes():
    picture = noise(12, 10)
    assert pixel_hash(picture) == pixel_hash(decode(encoded(picture, "PNG"), 1000).image)
    assert pixel_hash(picture) == pixel_hash(picture.convert("RGBA"))
    flat = Image.new("RGB", (12, 10))
    assert len({pixel_hash(flat), pixel_hash(flat.resize((10, 12))), pixel_hash(picture)}) == 3


def test_similar_images_have_near_hashes():
    pytest.importorskip("imagehash")
    hashes = [perceptual_hash(photo(200, 150, seed))[0] for seed in range(20)]
    assert min((first ^ second).bit_count() for first, second in itertools.combinations(hashes, 2)) > 8
    for seed, image_hash in enumerate(hashes):
        copy = decode(encoded(photo(200, 150, seed).resize((140, 105)), "JPEG", quality=80), 100_000).image
        assert (perceptual_hash(copy)[0] ^ image_hash).bit_count() <= 6
    red, blue = (perceptual_hash(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue"))
    assert red[1] == (255, 0, 0) and blue[1] == (0, 0, 255) and 0 <= red[0] < 1 << 64
