import io
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.media import tars
from pipeline.media.tar_search import TarSearch

_SIZES = {
    "equal": [20_000] * 300,
    "small": [10] * 2000,
    "skewed": [int(random.Random(0).lognormvariate(9, 1)) for _ in range(400)],
    "halves": [1000] * 500 + [40_000] * 200,
    "one large": [3000] * 200 + [4_000_000] + [3000] * 200,
    "one": [500_000],
    "empty images": [0, 0, 5, 0],
}


def _search(path: Path, keys: Iterable[str]) -> TarSearch:
    data = path.read_bytes()
    return TarSearch(lambda start, end: data[start:end], len(data), {key: at for at, key in enumerate(keys)})


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])  # before, between and after the other members
@pytest.mark.parametrize("name", _SIZES)
def test_every_image_is_found(tmp_path: Path, name: str, suffix: str) -> None:
    rng = random.Random(1)
    samples = [{"__key__": f"{number:06d}", suffix: rng.randbytes(size), "txt": b"a word",
                "json": rng.randbytes(rng.randrange(900))} for number, size in enumerate(_SIZES[name])]
    tars.write(tmp_path / "some.tar", samples)
    search = _search(tmp_path / "some.tar", [sample["__key__"] for sample in samples])
    for position in {0, len(samples) // 2, len(samples) - 1, *rng.sample(range(len(samples)), min(60, len(samples)))}:
        assert search.image(position) == samples[position][suffix], position


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unusual_headers_give_the_image_or_none(tmp_path: Path, tar_format: int) -> None:
    names = ["__meta__/0.json", "a/0.json", "a/0.JPG", f"{'long/' * 25}1.webp", "b/żółć 2.png", "4.png"]
    with tarfile.open(tmp_path / "some.tar", "w", format=tar_format) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    keys, expected = zip(*((sample["__key__"], tars.sample_image(sample)) for sample in tars.read(
        tmp_path / "some.tar") if tars.image_suffix(sample)), strict=True)
    images = [_search(tmp_path / "some.tar", keys).image(position) for position in range(len(keys))]
    assert all(image in (None, right) for image, right in zip(images, expected, strict=True))
    assert (images[0] == expected[0]) == (tar_format != tarfile.GNU_FORMAT)


def test_what_is_not_as_the_metadata_say_is_not_found(tmp_path: Path) -> None:
    samples = [{"__key__": f"{number:03d}", "jpg": bytes([number]) * 9000} for number in range(100)]
    tars.write(tmp_path / "some.tar", samples)
    keys = [sample["__key__"] for sample in samples]
    assert _search(tmp_path / "some.tar", [*keys[:50], "other", *keys[51:]]).image(50) is None
    assert _search(tmp_path / "some.tar", [*keys, "more"]).image(100) is None
    data = (tmp_path / "some.tar").read_bytes()
    (tmp_path / "some.tar").write_bytes(data[:len(data) // 2])
    search = TarSearch(lambda start, end: data[:len(data) // 2][start:end], len(data),
                       {key: at for at, key in enumerate(keys)})
    assert search.image(99) is None and search.image(3) == samples[3]["jpg"]
