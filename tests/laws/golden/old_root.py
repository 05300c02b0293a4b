"""Make a small root of datasets with the program and the libraries of a past day, to see that later ones read it.

    PYTHONPATH=CHECKOUT python old_root.py old_root.tar.gz [--train]

`old_root.tar.gz` was made so by commit a8d3969 with numpy 1.26.4, pandas 2.3.3, pyarrow 25.0.1, faiss 1.13.2 and
torch 2.14.1 on Python 3.11. Its datasets and runs:

    art      24 images in 3 shards: embeddings, captions, an index with inverted lists, neighbors
    art@v2   the first 16 of them and 8 others: embeddings, no index yet
    half     8 images in 4 shards: `embed` was killed after some of them
    short    with --train: a run that was killed after its first checkpoint; 7 MB, so the archive here has none
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

TRAIN = ("--precision", "fp32", "--global-batch", "4", "--k", "2", "--warmup", "2", "--log-every", "1",
         "--checkpoint-every", "4", "--model-channels", "32", "--head-dim", "16")
SHARDS = ("--image-size", "16", "--format", "png")
COLORS = ("red", "green", "blue", "orange", "purple", "black", "brown", "teal")


def draw(folder: Path, numbers: range) -> None:
    """Small images with captions: a disc or a box, in one of the colors and at some place."""
    folder.mkdir(parents=True)
    for number in numbers:
        color, x, y = COLORS[number % 8], 2 + number % 5, 2 + number % 7
        image = Image.new("RGB", (16, 16), "white")
        pen = ImageDraw.Draw(image)
        (pen.ellipse if number % 2 else pen.rectangle)((x, y, x + 7, y + 6), fill=color)
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {color} {'disc' if number % 2 else 'box'}")


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "jobs", *words, "--root", str(root), "--local"]


def run(root: Path, *words: str) -> None:
    subprocess.run(command(root, *words), check=True)


def kill_when(root: Path, begun: Callable[[], bool], *words: str) -> None:
    """Start a command and kill it as soon as `begun`."""
    with subprocess.Popen(command(root, *words)) as process:
        while not begun():
            if process.poll() is not None:
                raise SystemExit(f"{words[0]} ended before it could be killed")
            time.sleep(0.005)
        process.kill()


def make(work: Path) -> None:
    root = work / "root"
    draw(work / "art", range(24))
    draw(work / "newer", range(16))
    draw(work / "newer/more", range(40, 48))
    draw(work / "half", range(8))
    run(root, "shard", "art", "--source", str(work / "art"), "--samples-per-shard", "8", *SHARDS)
    run(root, "embed", "art", "--captions")
    run(root, "index", "art", "--key", "IVF4,SQ8")
    run(root, "neighbors", "art", "--k", "3")
    run(root, "shard", "art@v2", "--source", str(work / "newer"), "--samples-per-shard", "8", *SHARDS)
    run(root, "embed", "art@v2", "--captions")
    run(root, "shard", "half", "--source", str(work / "half"), "--samples-per-shard", "2", *SHARDS)
    records = root / "datasets/half/v1/embeddings/records"
    kill_when(root, lambda: records.exists() and len(list(records.iterdir())) > 0, "embed", "half")


def train(root: Path) -> None:
    checkpoints = root / "runs/short/checkpoints"
    kill_when(root, lambda: any(checkpoints.glob("*/manifest.json")), "train", "short", "--dataset", "art", "--steps",
              "400", *TRAIN)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        if "--train" in sys.argv:
            train(Path(folder) / "root")
        with tarfile.open(sys.argv[1], "w:gz") as archive:
            archive.add(Path(folder) / "root", "root")
