"""Synthetic JPEGs with the statistics of photographs, so that no measurement needs a download.

    python tests/bench/photographs.py [--work FOLDER] [--count 400]

Every octave of detail has equal power, as in natural images. There are objects with sharp and soft edges, texture,
gradients and grain. The images have 1 to 2 megapixels, a third of them upright, 4:2:0, quality 85 to 92, 250 to 450 kB.
The amount of grain is chosen to reach the file size. The same seed gives the same images with the same versions of
numpy and Pillow.
"""

import argparse
import io
import math
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COUNT = 400
_ASPECTS = (4 / 3, 3 / 2, 3 / 2, 16 / 9, 1.0)
_VERSION = 1


def work_folder(path: str = "") -> Path:
    """The folder of files that stay between measurements."""
    folder = Path(path or Path(tempfile.gettempdir()) / "rdm-bench").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def photograph(seed: int, number: int) -> bytes:
    """The bytes of one image, a different one for each pair of numbers."""
    rng = np.random.default_rng([_VERSION, seed, number])
    width, height = _size(rng)
    labels, objects = _objects(rng, width, height)
    light = _octaves(rng, width, height, 9)
    tint = np.stack([_octaves(rng, width // 4, height // 4, 6) for _ in range(2)], axis=2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x * np.cos(angle) + y * np.sin(angle)) / max(width, height)
    # Each object has its own color, roughness and pattern; the background is object 0.
    colour = rng.uniform(50, 205, (objects, 3)).astype(np.float32)
    colour += 0.6 * (colour.mean(axis=1, keepdims=True) - colour)  # the world is greyer than chance
    rough = rng.uniform(4, 22, objects).astype(np.float32)
    weave = (rng.uniform(0, 9, objects) * (rng.random(objects) < 0.4)).astype(np.float32)
    waves = rng.uniform(-1.2, 1.2, (objects, 2)).astype(np.float32)
    luma = light * rough[labels] + rng.uniform(-60, 60) * ramp
    luma += weave[labels] * np.sin(x * waves[labels, 0] + y * waves[labels, 1])
    pixels = colour[labels] + luma[..., None]
    for channel, band in ((0, 0), (2, 1)):
        pixels[..., channel] += 9 * _enlarged(tint[..., band], width, height)
    lens = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9)))
    sharp = np.asarray(lens, np.float32)
    grain = rng.standard_normal((height, width, 1), np.float32)
    quality = int(rng.integers(85, 93))
    wanted = rng.uniform(250_000, 450_000) * min(1.0, 0.55 + 0.3 * width * height / 1e6)
    return _of_size(sharp, grain, quality, max(252_000, wanted))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    area, aspect = rng.uniform(1.0e6, 2.0e6), rng.choice(_ASPECTS)
    long, short = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return (short, long) if rng.random() < 1 / 3 else (long, short)


def _objects(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, int]:
    """A map of the visible object of each pixel, front objects over back objects, and the number of objects."""
    plan = Image.new("L", (width, height))
    draw = ImageDraw.Draw(plan)
    count = int(rng.integers(12, 60))
    for label in range(1, count):
        x, y = rng.uniform(-0.1, 1.1, 2) * (width, height)
        # Few large ones, many small ones.
        radius = min(width, height) * 0.5 * rng.uniform(0.04, 1.0) ** 2 + 6
        if rng.random() < 0.4:
            across = radius * rng.uniform(0.3, 1.0)
            draw.ellipse((x - radius, y - across, x + radius, y + across), fill=label)
        else:
            turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
            draw.polygon([(x + radius * np.cos(turn), y + radius * np.sin(turn)) for turn in turns], fill=label)
    return np.asarray(plan), count


def _octaves(rng: np.random.Generator, width: int, height: int, levels: int) -> np.ndarray:
    """Noise with about the same power in each octave, mean 0, deviation 1; (height, width) float32."""
    total = np.zeros((height, width), np.float32)
    for level in range(levels):
        small = rng.standard_normal((max(2, height >> level), max(2, width >> level)), np.float32)
        # A lens passes less of the finest detail.
        total += _enlarged(small, width, height) * (0.35 if level == 0 else 0.7 if level == 1 else 1.0)
    return total / total.std()


def _enlarged(values: np.ndarray, width: int, height: int) -> np.ndarray:
    if values.shape == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def _of_size(sharp: np.ndarray, grain: np.ndarray, quality: int, wanted: float) -> bytes:
    """The image with enough grain for a file of about `wanted` bytes."""
    low, high, data = 0.0, 24.0, b""
    for _ in range(6):
        strength = (low + high) / 2
        buffer = io.BytesIO()
        image = Image.fromarray((sharp + strength * grain).clip(0, 255).astype(np.uint8))
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        data = buffer.getvalue()
        if abs(len(data) - wanted) < 0.05 * wanted:
            break
        low, high = (low, strength) if len(data) > wanted else (strength, high)
    return data


def _make(folder: Path, seed: int, number: int) -> None:
    path = folder / f"{number:06d}.jpg"
    if not path.exists():
        hidden = path.with_suffix(f".{os.getpid()}")
        hidden.write_bytes(photograph(seed, number))
        hidden.rename(path)


def make(work: Path, count: int = COUNT, seed: int = 1) -> list[Path]:
    """Paths of `count` images below the work folder, made where they are missing."""
    folder = work / f"photographs-{_VERSION}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(count) if not (folder / f"{number:06d}.jpg").exists()]
    if missing:
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(_make, folder, seed), missing))
    return [folder / f"{number:06d}.jpg" for number in range(count)]


def fill_folder(work: Path, count: int) -> Path:
    """A folder of `count` photographs, in which the different ones repeat."""
    folder = work / f"folder-{count}"
    if not folder.exists():
        hidden = work / f"folder-{count}.part"
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        originals = make(work, min(count, COUNT))
        for number in range(count):
            shutil.copyfile(originals[number % len(originals)], hidden / f"{number:06d}.jpg")
        hidden.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", help="folder of the images; default: rdm-bench in the temporary folder")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    paths = make(work_folder(args.work), args.count, args.seed)
    sizes = np.array([path.stat().st_size for path in paths]) / 1e3
    pixels = np.array([math.prod(Image.open(path).size) for path in paths]) / 1e6
    print(f"{len(paths)} images in {paths[0].parent}: {sizes.min():.0f} to {sizes.max():.0f} kB, "
          f"mean {sizes.mean():.0f}; {pixels.min():.2f} to {pixels.max():.2f} megapixels, mean {pixels.mean():.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
