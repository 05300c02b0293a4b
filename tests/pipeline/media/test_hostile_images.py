"""Images that attack their decoder are skipped with a reason, in bounded memory and time."""

import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.media import decode as decoding
from pipeline.media import image_headers, isolation, tars
from pipeline.media.decode import decode, read_exif, read_size
from pipeline.media.resize import decode_pixels
from pipeline.media.types import BadImage
from pipeline.shards.adopt import Adopt
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline.media.sample_images import png, reason
from tests.pipeline.synthetic import encoded, noise

REPOSITORY = Path(__file__).parents[3]


def progressive(side: int, scans: int, color: str = "red") -> bytes:
    """A JPEG that repeats its last scan."""
    data = encoded(Image.new("RGB", (side, side), color), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def large_png(width: int, height: int) -> bytes:
    """A PNG of zeros, a small part of its pixels."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    data = png(width, height, 8, 2, b"x")
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:start] + struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(
        ">I", zlib.crc32(b"IDAT" + rows)) + data[end:]


def icon(*images: bytes) -> bytes:
    directory, start = struct.pack("<HHH", 0, 1, len(images)), 6 + 16 * len(images)
    for image in images:
        directory += struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(image), start)
        start += len(image)
    return directory + b"".join(images)


def tiff_of_many_tags(tags: int, size: int) -> bytes:
    """A TIFF of one pixel whose tags all refer to the same bytes."""
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (279, 4, 1, 1)]
    entries += [(40_000 + number, 7, size, 16) for number in range(tags)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 16 + size) + bytes(8 + size)
    return data + body


def peak_of(code: str, *arguments: str) -> tuple[str, int, float]:
    """Run a new process. Its output, the peak of its memory (or of its children) in MB, and its seconds."""
    program = f"""
import resource, sys
from pipeline.media.decode import decode, read_exif, read_size
from pipeline.media.resize import decode_pixels
from pipeline.media.types import BadImage
data = open(sys.argv[1], "rb").read()
try:
    {code}
    print("fine")
except BadImage as bad:
    print(bad.reason)
from pipeline.media import isolation
isolation._close()
# Not ru_maxrss: after a vfork it is that of the process that started this one.
own, = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10)
"""
    begun = time.monotonic()
    output = subprocess.run([sys.executable, "-c", program, *arguments], cwd=REPOSITORY, check=True,
                            stdout=subprocess.PIPE, text=True).stdout.split()
    return output[0], int(output[1]), time.monotonic() - begun


@pytest.fixture(scope="module")
def giant() -> bytes:
    return large_png(30_000, 30_000)


@pytest.mark.timeout(120)
def test_an_icon_with_a_huge_image_is_refused_by_its_header(tmp_path, giant):
    assert reason(icon(giant), max_pixels=100_000_000) == "too_many_pixels"
    assert reason(icon(encoded(noise(16, 16), "PNG"), giant), max_pixels=100_000_000) == "too_many_pixels"
    (tmp_path / "some.ico").write_bytes(icon(giant))
    for code, expected in (("decode(data, 10**8)", "too_many_pixels"), ("decode_pixels(data)", "too_much_memory")):
        said, peak, _ = peak_of(code, str(tmp_path / "some.ico"))
        assert said == expected and peak < 1300


@pytest.mark.timeout(60)
def test_a_jpeg_with_very_many_scans_is_refused_before_decoding():
    bomb = progressive(2000, 33_000)
    begun = time.process_time()
    assert reason(bomb) == "too_many_scans"
    with pytest.raises(BadImage, match="too_many_scans"):
        decode_pixels(bomb)
    assert time.process_time() - begun < 5


def test_scans_are_counted_as_the_decoder_finds_them():
    for scans in (1, 65, 490):
        data = progressive(16, scans)
        assert image_headers.is_suspicious(data) == (scans > 60)
        assert np.asarray(decode(data, 1000).image).shape == decode_pixels(data).shape == (16, 16, 3)
    marks = b"\xff\xda" * 5000
    data = encoded(noise(16, 16), "JPEG")
    for more in (data[:2] + b"\xff\xec" + struct.pack(">H", 2 + len(marks)) + marks + data[2:], data + marks):
        assert not image_headers.is_suspicious(more)
        assert np.asarray(decode(more, 1000).image).tolist() == np.asarray(decode(data, 1000).image).tolist()


@pytest.mark.timeout(120)
def test_a_tiff_with_all_tags_on_the_same_bytes_takes_bounded_memory(tmp_path):
    (tmp_path / "some.tif").write_bytes(tiff_of_many_tags(8000, 2 << 20))  # 16 GB as tags
    for code in ("decode(data, 1000)", "read_size(data)", "read_exif(data)"):
        _, peak, _ = peak_of(code, str(tmp_path / "some.tif"))
        assert peak < 1400
    assert read_size(tiff_of_many_tags(3, 100)) == (1, 1)


def test_large_exif_is_read_in_another_process(monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 70_000
    data = encoded(noise(24, 16), "PNG", exif=exif)
    seen = []
    call = isolation.call
    monkeypatch.setattr(isolation, "call", lambda *arguments, **options: seen.append(1) or call(*arguments, **options))
    assert decode(data, 1000).width == 16 and len(seen) == 1
    assert read_exif(data) == {"ImageDescription": "x" * 500, "Orientation": "6"} and len(seen) == 2
    exif[0x010E] = "short"
    assert decode(encoded(noise(24, 16), "PNG", exif=exif), 1000).width == 16 and len(seen) == 2


@pytest.mark.parametrize("size", [b"VP8X", b"VP8L", b"VP8 "])
def test_the_size_of_a_webp_is_known_before_it_is_opened(size):
    image = noise(40, 30)
    options = {"VP8X": {"exif": b"Exif\0\0x"}, "VP8L": {"lossless": True}, "VP8 ": {}}[size.decode()]
    data = encoded(image, "WEBP", **options)
    assert data[12:16] == size and image_headers.sizes_before_opening(data) == [(40, 30)]
    assert reason(data, max_pixels=1199) == "too_many_pixels" and decode(data, 1200).width == 40


def test_frames_of_a_gif_are_counted_up_to_a_limit(monkeypatch):
    frames = [Image.new("P", (8, 8), number) for number in range(40)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)
    assert decode(data, 100).remarks == [("animated", "first of 40 frames taken")]
    monkeypatch.setattr(image_headers, "MOST_FRAMES", 39)
    assert decode(data + b"," * 50, 100).remarks == [("animated", "first of 39 frames or more taken")]
    monkeypatch.setattr(image_headers, "MOST_FRAMES", 40)
    assert decode(data + b"," * 50, 100).remarks == [("animated", "first of 40 frames taken")]


@pytest.mark.parametrize("image_format", ["TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "DIB"])
def test_an_image_decoded_in_another_process_is_the_same(image_format):
    image = noise(40, 40)
    data = encoded(image, image_format)
    theirs = decode(data, 10_000)
    ours = decoding._decode(data, 10_000, 0, "center_crop", 0, 100, False)
    assert isinstance(theirs.image, Image.Image) and theirs.image.mode == "RGB"
    assert np.array_equal(np.asarray(theirs.image), np.asarray(ours.image))
    assert (theirs.width, theirs.format, theirs.plain, theirs.box) == (ours.width, ours.format, ours.plain, ours.box)


def test_a_large_jpeg_comes_at_the_same_fraction_from_another_process(monkeypatch):
    data = encoded(noise(301, 203), "JPEG")
    here = decode(data, 10**6, at_least=32)
    monkeypatch.setattr(isolation, "MOST_PIXELS", 1000)
    there = decode(data, 10**6, at_least=32)
    assert isinstance(there.image, np.ndarray) and np.array_equal(here.image, there.image) and here.box == there.box
    assert np.array_equal(decode_pixels(data), np.asarray(decode(data, 10**6).image))


def test_every_failure_of_the_other_process_has_a_reason():
    for function, argument, expected in (
            (np.zeros, 3 << 30, "too_much_memory"), (os._exit, 3, "corrupt"), (os.abort, None, "corrupt"),
            (os.strerror, "x", "corrupt")):
        with pytest.raises(BadImage, match=expected):
            isolation.call(function, *([] if argument is None else [argument]))
    assert isolation.call(os.strerror, 2) == os.strerror(2)
    pid = isolation.call(os.getpid)
    assert pid != os.getpid() and isolation.call(os.getpid) == pid


def test_a_decoder_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(isolation, "_idle", [])
    monkeypatch.setenv("PYTHONPATH", "")
    program = ("from pipeline.media import isolation; isolation._BASE_SECONDS = 0.5; isolation.serve()")
    popen = subprocess.Popen

    def shorter(command, **options):
        return popen([*command[:-1], program], **options)
    monkeypatch.setattr(subprocess, "Popen", shorter)
    begun = time.process_time()
    with pytest.raises(BadImage, match="too_slow"):
        isolation.call(pow, 3, 10**9)  # native code without interruption
    assert time.process_time() - begun < 5


def test_the_other_process_ends_with_its_parent():
    program = ("import os; from pipeline.media import isolation; print(isolation.call(os.getpid), flush=True); "
               "os.kill(os.getpid(), 9)")
    output = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
    deadline = time.monotonic() + 30
    while Path(f"/proc/{int(output)}").exists() and "Z" not in Path(f"/proc/{int(output)}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(200)
def test_hostile_images_are_skipped_and_the_corpus_is_sealed(tmp_path, giant):
    source = tmp_path / "pictures"
    source.mkdir()
    for name, data in {"a.png": encoded(noise(40, 40), "PNG"), "b.jpg": progressive(500, 2000),
                       "c.ico.png": icon(giant),
                       "e.tif": encoded(noise(40, 40), "TIFF"), "f.jpg": progressive(64, 100)}.items():
        (source / name).write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = run_stage(Shard(Dataset.parse(str(tmp_path / "root"), "x"),
                               ShardConfig(source=str(source), image_size=32)))
    assert manifest["totals"]["samples"] == 3
    assert manifest["totals"]["skipped"] == {"too_many_pixels": 1, "too_many_scans": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (300 << 10)


@pytest.mark.timeout(300)
def test_hostile_images_in_adopted_tars_are_rows_of_zeros(tmp_path, giant):
    (tmp_path / "tars").mkdir()
    images = [encoded(noise(40, 40), "PNG"), progressive(500, 2000), icon(giant), encoded(noise(40, 40, 1), "TIFF")]
    tars.write(tmp_path / "tars" / "0.tar",
               [{"__key__": str(number), "jpg": data} for number, data in enumerate(images)])
    dataset = Dataset.parse(str(tmp_path / "root"), "x")
    manifest = run_stage(Adopt(dataset, ShardConfig(source=str(tmp_path / "tars"))))
    assert manifest["totals"]["samples"] == 4 and manifest["totals"]["noted"] == {"unreadable": 2}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = run_stage(Embed(dataset, EmbedConfig(batch_size=4)))
    assert manifest["totals"]["noted"] == {"undecodable": 2}
    assert Embeddings(dataset).all().any(1).tolist() == [True, False, False, True]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1000 << 10)  # the encoder


def test_images_of_very_many_parts_are_not_read_in_this_process() -> None:
    """Pillow reads each of them in Python: millions take minutes, and a gigabyte for a GIF."""
    image = Image.new("P", (32, 32))
    gif, ppm, jpeg_2000, avif, flat = (encoded(image.convert(mode), kind) for mode, kind in (
        ("P", "GIF"), ("RGB", "PPM"), ("RGB", "JPEG2000"), ("RGB", "AVIF"), ("RGB", "PNG")))
    block, chunk = gif.index(b"\x2c"), flat.index(b"IDAT") - 4
    text = struct.pack(">I", 1) + b"tEXta" + struct.pack(">I", zlib.crc32(b"tEXta"))
    hostile = [gif[:block] + b"\x21\xfe\x01a\0" * 300_000 + gif[block:], ppm.replace(b"P6\n", b"P6\n" + b"#a\n" * 9),
               jpeg_2000, avif, flat[:chunk] + text * 20_000 + flat[chunk:], flat[:-12] + text * 20_000 + flat[-12:]]
    assert all(map(image_headers.is_suspicious, hostile))
    assert not image_headers.is_suspicious(gif) and not image_headers.is_suspicious(flat)
    assert not image_headers.is_suspicious(encoded(noise(700, 700, 1), "PNG"))
    for data in hostile:
        assert decode(data, 10_000).image.size == (32, 32)
