"""Make a small root with a published database, a training run and samples, with the program of a past day.

    PYTHONPATH=CHECKOUT python FOLDER/old_published.py old_published.tar.gz [--whole]

CHECKOUT has the program; run it in a folder outside of any checkout. `old_published.tar.gz` was made so by
commit a8d3969 with the libraries that old_root.py names. Its datasets and runs:

    styles      v1: 24 images in 3 shards; v2, the published one: without image 3, image 20 changed, image 24 added
    small       a finished run of 4 steps with neighbors from styles, and its samples of two prompts; the weights in its
                checkpoint and the files of wandb only with --whole: 6 MB, so the archive here has none
"""

import os
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

if __name__ == "__main__":  # beside the program of a past day, whose folders are other ones
    from old_root import SHARDS, draw, run
else:
    from tests.laws.golden.old_root import SHARDS, draw, run

TRAIN = ("--steps", "4", "--precision", "fp32", "--global-batch", "4", "--k", "2", "--warmup", "2", "--log-every", "1",
         "--checkpoint-every", "4", "--model-channels", "32", "--head-dim", "16")
GATES = ("--samples-per-shard", "8", "--min-overlap", "0", "--min-recall", "0")
WRITTEN = 1_700_000_000  # when each image of the first version was written, in seconds of the epoch


def draw_first(folder: Path) -> None:
    """The source of v1."""
    draw(folder, range(24))
    for path in folder.iterdir():
        os.utime(path, (WRITTEN, WRITTEN))


def change(folder: Path) -> None:
    """Make the source of v2 from that of v1."""
    for ending in ("png", "txt"):
        (folder / f"003.{ending}").unlink()
    Image.new("RGB", (16, 16), "yellow").save(folder / "020.png")
    os.utime(folder / "020.png", (WRITTEN + 1, WRITTEN + 1))
    draw(folder / "more", range(24, 25))
    for path in (folder / "more").iterdir():
        os.utime(path, (WRITTEN, WRITTEN))


def without_weights(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    weights = "/checkpoints/" in member.name and member.name.endswith(".safetensors")
    return None if weights or "/wandb/" in member.name else member


def make(work: Path) -> None:
    root, source = work / "root", work / "source"
    draw_first(source)
    run(root, "rebuild", "styles", "--source", str(source), *GATES, *SHARDS)
    change(source)
    run(root, "rebuild", "styles", "--source", str(source), *GATES, *SHARDS)
    run(root, "neighbors", "styles@v2", "--k", "3")
    run(root, "train", "small", "--dataset", "styles@v2", *TRAIN)
    run(root, "sample", "small", "--prompt", "a red disc", "--prompt", "a blue box", "--database", "styles@v2",
        "--k", "2", "--steps", "2", "--name", "first")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        with tarfile.open(sys.argv[1], "w:gz") as archive:
            archive.add(Path(folder) / "root", "root", filter=None if "--whole" in sys.argv else without_weights)
