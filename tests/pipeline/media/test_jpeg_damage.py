"""Decoding keeps files with small damage, refuses large damage, and leaves undamaged files as they are."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.media.decode import decode
from pipeline.media.jpeg_damage import MOST_LOST
from pipeline.media.resize import decode_pixels
from pipeline.media.types import BadImage, Decoded
from tests.pipeline.media.sample_images import photo, psnr, reason
from tests.pipeline.synthetic import encoded

IMAGE = photo(640, 480)
JPEGS = {name: encoded(IMAGE, "JPEG", quality=85, **options) for name, options in {
    "standard tables": {}, "optimized tables": {"optimize": True}, "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1}, "no subsampling": {"subsampling": 0}}.items()}
SEQUENTIAL = [name for name in JPEGS if name != "progressive"]
REPOSITORY = Path(__file__).parents[3]


def scan_start(data: bytes) -> int:
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2:at + 4], "big")


def cut(data: bytes, share: float) -> bytes:
    """The file without the last `share` of the bytes after its headers."""
    start = scan_start(data)
    return data[:start + int((1 - share) * (len(data) - start))]


def pixels(image: Decoded) -> np.ndarray:
    return np.asarray(image.image)


def loss(image: Decoded) -> str:
    """The loss that the ledger names."""
    assert [name for name, _ in image.remarks] == ["damaged"] and not image.plain
    return image.remarks[0][1]


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize(("tail", "said"), [(b"", "end marker is missing"), (bytes(9) + b"\xff\xd9", "filler"),
                                            (bytes(300) + b"\xff\xd9", "filler"), (b"\x55" * 90, "filler")])
def test_damage_after_the_last_pixel_changes_no_pixel(name, tail, said):
    whole, damaged = decode(JPEGS[name], 10**6), decode(JPEGS[name][:-2] + tail, 10**6)
    assert said in loss(damaged) and "no pixel is lost" in loss(damaged)
    assert (pixels(damaged) == pixels(whole)).all() and not whole.remarks and whole.plain
    reduced = decode(JPEGS[name][:-2] + tail, 10**6, at_least=100)
    assert (pixels(reduced) == pixels(decode(JPEGS[name], 10**6, at_least=100))).all()
    assert "no pixel is lost" in loss(reduced) and (reduced.width, reduced.height) == IMAGE.size


@pytest.mark.parametrize("tail", [b"", bytes(2000), b"\xff" * 2000], ids=["cut", "zeros", "erased flash"])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_lost_rows_are_cut_off_if_they_are_few(name, tail):
    damaged = decode(cut(JPEGS[name], 0.03) + tail, 10**6)
    lost = IMAGE.height - damaged.height
    assert 0 < lost <= MOST_LOST * IMAGE.height and f"{lost} of 480 rows are lost" in loss(damaged)
    whole = Image.fromarray(pixels(decode(JPEGS[name], 10**6))[:damaged.height])
    assert psnr(Image.fromarray(pixels(damaged)), whole) > 60  # chroma of the row below is missing in the last one
    with pytest.raises(BadImage, match=r"corrupt: a JPEG of which .* of 480 rows are lost"):
        decode(cut(JPEGS[name], 0.3) + tail, 10**6)


def test_a_progressive_file_may_lack_the_scans_that_refine_it():
    data = JPEGS["progressive"]
    ends = [at for at in range(len(data)) if data[at:at + 2] == b"\xff\xda"]
    verdicts = []
    for end in ends[1:]:  # most of this scan and all later scans are lost
        try:
            damaged = decode(data[:end + 40], 10**6)
            verdicts.append(psnr(Image.fromarray(pixels(damaged)), Image.fromarray(pixels(decode(data, 10**6)))))
            assert "the end of the last scan is missing; it refines the others" in loss(damaged)
        except BadImage as bad:
            assert bad.reason == "corrupt" and "scans are whole, too few" in bad.detail
            verdicts.append(0.0)
    assert verdicts[:5] == [0.0] * 5 and all(value > 30 for value in verdicts[5:]) and len(verdicts) == 9
    inside = ends[-1] - 300  # the last scan but one
    damaged = decode(data[:inside] + bytes(200) + data[inside + 200:], 10**6)
    assert "only the first 8 scans are whole" in loss(damaged)


@pytest.mark.parametrize("name", JPEGS)
def test_zeros_in_the_data_give_no_wrong_image(name):
    chance, data = random.Random(name), JPEGS[name]
    whole = Image.fromarray(pixels(decode(data, 10**6)))
    refused = 0
    for _ in range(15):
        at = chance.randrange(scan_start(data), len(data) - 302)
        damaged = data[:at] + bytes(300) + data[at + 300:]
        try:
            image = decode(damaged, 10**6)
        except BadImage as bad:
            assert bad.reason == "corrupt"
            with pytest.raises(BadImage):  # readers of shards do the same
                decode_pixels(damaged)
            refused += 1
            continue
        assert psnr(Image.fromarray(pixels(image)), whole.crop((0, 0, image.width, image.height))) > 28
        assert name == "progressive" or loss(image)  # zeros in a scan that refines others may look right
    assert refused > 5


def test_damage_without_a_known_end_is_refused():
    data = JPEGS["standard tables"]
    middle = len(data) // 2
    with pytest.raises(BadImage, match="corrupt: a JPEG that is damaged at an unknown place"):
        decode(data[:middle] + data[middle + 5000:], 10**6)
    assert reason(data[:scan_start(data)]) == reason(data[:200]) == "corrupt"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colors_are_checked_too(mode):
    data = encoded(IMAGE.convert(mode), "JPEG", quality=85)
    whole, damaged = decode(data, 10**6), decode(data[:-2], 10**6)
    assert (pixels(damaged) == pixels(whole)).all() and "no pixel is lost" in loss(damaged)
    lower = decode(cut(data, 0.03), 10**6)
    assert 430 < lower.height < 480
    assert psnr(Image.fromarray(pixels(lower)), Image.fromarray(pixels(whole)[:lower.height])) > 50
    start = (scan_start(data) + len(data)) // 2
    assert reason(data[:start] + bytes(300) + data[start + 300:]) == "corrupt"


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"quality": 5},
                                     {"subsampling": 0, "optimize": True}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_undamaged_files_have_the_pixels_of_pillow(mode, options):
    flat = Image.new("RGB", (700, 300), "white")
    flat.paste("navy", (0, 0, 90, 60))
    for image in (flat, IMAGE):  # large flat areas are runs of zeros in optimized files
        data = encoded(image.convert(mode), "JPEG", **options)
        result = decode(data, 10**6)
        assert not result.remarks and (pixels(result) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_a_header_that_is_only_unusual_is_no_damage():
    data = JPEGS["standard tables"]
    odd = data[:11] + b"\x09" + data[12:]  # the version of JFIF
    with pytest.raises(ValueError, match="JFIF"):
        simplejpeg.decode_jpeg(odd, "RGB")
    assert (pixels(decode(odd, 10**6)) == pixels(decode(data, 10**6))).all() and not decode(odd, 10**6).remarks
    assert "no pixel is lost" in loss(decode(odd[:-2], 10**6))
    middle = len(odd) // 2
    assert reason(odd[:middle] + bytes(300) + odd[middle + 300:]) == "corrupt"


@pytest.mark.parametrize(("kind", "lacking", "verdict"), [
    ("PNG", 12, "kept"),  # its end chunk alone
    ("PNG", 400, "corrupt"), ("GIF", 1, "kept"), ("GIF", 400, "corrupt"), ("WEBP", 1, "corrupt"),
    ("WEBP", 400, "corrupt"), ("BMP", 1, "corrupt"), ("AVIF", 1, "corrupt"), ("JPEG2000", 400, "corrupt")])
def test_other_formats_that_are_cut_are_refused_unless_they_are_complete(kind, lacking, verdict):
    image = IMAGE.quantize(64) if kind == "GIF" else IMAGE
    data = encoded(image, kind)
    if verdict == "kept":
        assert (pixels(decode(data[:-lacking], 10**6)) == pixels(decode(data, 10**6))).all()
    else:
        assert reason(data[:-lacking]) == verdict


def test_a_png_with_one_wrong_bit_is_refused():
    """PNG has checksums. JPEG, WebP, GIF, BMP and AVIF have none."""
    data = bytearray(encoded(IMAGE, "PNG"))
    data[len(data) // 2] ^= 4
    assert reason(bytes(data)) == "corrupt"


def test_the_process_for_suspicious_images_imports_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the wrong pipeline')")
    (tmp_path / "image.jpg").write_bytes(JPEGS["standard tables"][:-2])
    program = ("from pathlib import Path; from pipeline.media.decode import decode; "
               "print(decode(Path('image.jpg').read_bytes(), 10**6).remarks)")
    run = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)},
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "damaged" in run.stdout, run.stderr


@pytest.mark.parametrize("zeros", [1, 64])
def test_a_zero_in_a_quantization_table_is_damage(zeros: int) -> None:
    data = JPEGS["standard tables"]
    table = data.index(b"\xff\xdb") + 5
    assert reason(data[:table] + bytes(zeros) + data[table + zeros:]) == "corrupt"
