"""Damage JPEGs in several ways, and count which of them the pipeline keeps, leaves out, or cannot tell from good ones.

    python tests/bench/data/jpeg_damage.py [--count 24] [--images FOLDER]

Without a folder of JPEGs the images come from tests/bench/photographs.py and reduced to 512 pixels. Each is encoded
as a sequential JPEG with the standard tables and as a progressive one, damaged, and decoded. The output is a table in
Markdown. "libjpeg-turbo" is the median PSNR against the undamaged file if warnings are ignored. "kept" has the lowest
PSNR of the images that are kept, over the rows that they have; "unseen" are images without any warning.
"""

import argparse
import io
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests/bench")]
from photographs import photograph  # noqa: E402 (the path is set above)

from pipeline.media.decode import decode  # noqa: E402
from pipeline.media.types import BadImage  # noqa: E402

_KINDS = {"sequential": {}, "progressive": {"progressive": True}}
_TRIES = 4  # places of damage in each image


def _start(data: bytes) -> int:
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2:at + 4], "big")


def _cut(share: float) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, chance: data[:len(data) - max(2, int(share * (len(data) - _start(data))))]


def _anywhere(length: int, change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    def damage(data: bytes, chance: random.Random) -> bytes:
        at = chance.randrange(_start(data), len(data) - length - 2)
        return data[:at] + change(data[at:at + length], chance) + data[at + length:]
    return damage


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "none": lambda data, chance: data,
    "the end marker (2 bytes) is missing": _cut(0),
    "30 bytes of filler before the end marker": lambda data, chance: data[:-2] + bytes(30) + data[-2:],
    "the last 1 % is missing": _cut(0.01),
    "the last 5 % is missing": _cut(0.05),
    "the last 10 % is missing": _cut(0.1),
    "the last 20 % is missing": _cut(0.2),
    "the last 50 % is missing": _cut(0.5),
    "the last 5 % is zeros": lambda data, chance: (short := _cut(0.05)(data, chance)) + bytes(len(data) - len(short)),
    "300 bytes are zeros": _anywhere(300, lambda part, chance: bytes(len(part))),
    "300 bytes are random": _anywhere(300, lambda part, chance: chance.randbytes(len(part))),
    "100 bytes are missing": _anywhere(100, lambda part, chance: b""),
    "1 bit is wrong": _anywhere(1, lambda part, chance: bytes([part[0] ^ 1 << chance.randrange(8)])),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    images = _read_images(options.images, options.count)
    print("| damage | kind | libjpeg-turbo | kept | left out | unseen |\n|---|---|---|---|---|---|")
    for name, damage in DAMAGE.items():
        for kind, settings in _KINDS.items():
            tries = _TRIES if name.endswith(("zeros", "random", "missing", "wrong")) and name[0].isdigit() else 1
            print(_row(name, kind, [(_encode(image, settings), damage) for image in images], tries))


def _row(name: str, kind: str, files: list[tuple[bytes, Callable[[bytes, random.Random], bytes]]], tries: int) -> str:
    chance = random.Random(f"{name} {kind}")
    ignored, kept, unseen, left_out = [], [], [], 0
    for data, damage in files:
        whole = simplejpeg.decode_jpeg(data, "RGB")
        for _ in range(tries):
            damaged = damage(data, chance)
            ignored.append(_ignoring_warnings(damaged, whole))
            try:
                image = decode(damaged, 1 << 26)
            except BadImage:
                left_out += 1
                continue
            pixels = np.asarray(image.image)
            (kept if image.remarks else unseen).append(_psnr(pixels, whole[:len(pixels)]))
    return (f"| {name} | {kind} | {_decibels(float(np.median(ignored)))} | {_group(kept)} | {left_out} | "
            f"{_group(unseen)} |")


def _ignoring_warnings(damaged: bytes, whole: np.ndarray) -> float:
    try:
        return _psnr(simplejpeg.decode_jpeg(damaged, "RGB", strict=False), whole)
    except ValueError:
        return 0.0


def _group(values: list[float]) -> str:
    return f"{len(values)} (from {_decibels(min(values))})" if values else "0"


def _decibels(value: float) -> str:
    return "same pixels" if np.isinf(value) else f"{value:.1f} dB"


def _psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    if pixels.shape != reference.shape:
        return 0.0
    error = np.mean((pixels.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255 ** 2 / error))


def _read_images(folder: Path | None, count: int) -> list[Image.Image]:
    files = sorted(folder.glob("*.jp*g"))[:count] if folder else []
    images = ([Image.open(file).convert("RGB") for file in files] if folder else
              [Image.open(io.BytesIO(photograph(0, number))) for number in range(count)])
    for image in images:
        image.thumbnail((512, 512))
    return images


def _encode(image: Image.Image, settings: dict[str, bool]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, **settings)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
