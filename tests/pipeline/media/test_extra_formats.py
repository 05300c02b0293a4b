"""HEIC and JPEG XL: decoded with the extra `formats`, named without it, and bounded as all other formats."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.media import image_headers, isolation
from pipeline.media.decode import decode, read_size
from pipeline.media.types import BadImage
from tests.pipeline.media.sample_images import jxl_header, photo, psnr, reason, without_extra_formats
from tests.pipeline.shards.test_shard import ledger, shard_source
from tests.pipeline.synthetic import encoded

# Written by pillow-heif 1.8.1, which is pi-heif with an encoder.
HEIC = (Path(__file__).parent / "shapes.heic").read_bytes()
SHAPES = Image.open(io.BytesIO((Path(__file__).parent / "shapes.png").read_bytes()))


@pytest.fixture
def jpeg_xl():
    """A function that encodes as JPEG XL, by the package that decodes it."""
    pytest.importorskip("pillow_jxl", reason="pip install pillow-jxl-plugin")
    import pillow_jxl.JpegXLImagePlugin  # noqa: F401 (registers the format)

    def encode(image: Image.Image, **options) -> bytes:
        return encoded(image, "JXL", **options)
    return encode


def test_heic_is_decoded():
    pytest.importorskip("pi_heif", reason="pip install pi-heif")
    image = decode(HEIC, 10**6)
    assert (image.width, image.height, image.format, image.remarks) == (96, 64, "heif", [])
    assert psnr(Image.fromarray(np.asarray(image.image)), SHAPES) > 30
    assert read_size(HEIC) == (96, 64)
    assert reason(HEIC[:-1]) == reason(HEIC[:300]) == reason(HEIC[:40]) == "corrupt"
    assert reason(HEIC, max_pixels=96 * 64 - 1) == "too_many_pixels"


def test_jpeg_xl_is_decoded(jpeg_xl):
    image = photo(120, 80)
    assert (np.asarray(decode(jpeg_xl(image, lossless=True), 10**6).image) == np.asarray(image)).all()
    for options in ({}, {"use_container": True}, {"exif": b"Exif\0\0II*\0" + bytes(8)}):
        data = jpeg_xl(image, **options)
        result = decode(data, 10**6)
        assert (result.width, result.height, result.format, result.remarks) == (120, 80, "jxl", [])
        assert psnr(Image.fromarray(np.asarray(result.image)), image) > 30
        assert image_headers.sizes_before_opening(data) == [(120, 80)]
        assert reason(data[:-1]) == reason(data[:60]) == "corrupt"
    for mode in ("L", "RGBA"):
        assert np.asarray(decode(jpeg_xl(image.convert(mode)), 10**6).image).shape == (80, 120, 3)


@pytest.mark.parametrize("size", [(1, 1), (8, 256), (256, 256), (300, 200), (640, 512), (1600, 900), (37, 5000)])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(jpeg_xl, size):
    data = jpeg_xl(Image.new("RGB", size))
    assert image_headers.sizes_before_opening(data) == [size] == [read_size(data)]
    assert image_headers.sizes_before_opening(jxl_header(*size)) == [size]


def test_an_orientation_is_applied_once(jpeg_xl, tmp_path):
    """In JPEG XL the coded image is upright, and its EXIF has no effect. A JPEG inside follows its own EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(96, 64)
    assert decode(jpeg_xl(image, exif=exif.tobytes()), 10**6).width == 96
    image.save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as jpeg:
        jpeg.save(tmp_path / "photo.jxl", lossless_jpeg=True)
    turned = decode((tmp_path / "photo.jxl").read_bytes(), 10**6)
    assert (turned.width, turned.height) == (64, 96)
    assert (np.asarray(turned.image) == np.asarray(decode((tmp_path / "photo.jpg").read_bytes(), 10**6).image)).all()


def test_huge_images_are_refused_before_they_are_decoded():
    """These files end after their headers, so a decoder would report them as corrupt."""
    assert reason(jxl_header(60_000, 60_000)) == "too_many_pixels"
    container = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl \0\0\0\x14Exif" + b"\xff\n" * 6
    assert reason(container + b"\0\0\0\0jxlc" + jxl_header(60_000, 60_000)) == "too_many_pixels"
    at = HEIC.index(b"ispe") + 8
    giant = HEIC[:at] + struct.pack(">II", 60_000, 60_000) + HEIC[at + 8:]
    assert reason(giant[:giant.index(b"mdat")]) == "too_many_pixels"


def test_a_large_jpeg_xl_is_decoded_within_its_limits(jpeg_xl):
    side = 6000
    assert side * side > isolation.MOST_PIXELS
    image = decode(jpeg_xl(Image.new("RGB", (side, side), "teal"), effort=1), side * side, at_least=100)
    assert np.asarray(image.image)[side // 2, side // 2].tolist() == [0, 128, 128]


def test_without_the_extra_the_reason_names_it(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.heic").write_bytes(HEIC)
    (tmp_path / "source/b.jxl").write_bytes(jxl_header(96, 64))
    (tmp_path / "source/c.png").write_bytes(encoded(SHAPES, "PNG"))
    with without_extra_formats():
        dataset, manifest = shard_source(tmp_path / "root", tmp_path / "source")
    assert manifest["totals"]["skipped"] == {"needs_formats_extra": 2} and manifest["totals"]["samples"] == 1
    details = {line["key"]: line["detail"] for line in ledger(dataset, manifest) if not line["kept"]}
    assert details == {"a.heic": "HEIC; pip install pi-heif", "b.jxl": "JPEG XL; pip install pillow-jxl-plugin"}


def test_avif_with_a_general_brand_needs_no_extra():
    data = encoded(SHAPES, "AVIF")
    general = data[:8] + b"mif1" + data[12:]
    assert image_headers.extra_format(general) == ""
    try:
        assert decode(general, 10**6).format == "avif"
    except BadImage as bad:
        assert bad.reason != "needs_formats_extra"
