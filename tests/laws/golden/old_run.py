"""Train a very small run on the datasets of old_published.tar.gz and sample from it, with the program of a past day.

    PYTHONPATH=CHECKOUT python FOLDER/old_run.py old_run.tar.xz

CHECKOUT has the program; run it in a folder outside of any checkout. `old_run.tar.xz` was made so by commit a8d3969
with the libraries that old_root.py names. It has no datasets, only:

    root/runs/tiny  a finished run of 1 step, and its samples `first`
    continued       what the same run had after 4 steps: its metrics and its samples `fourth`

After one step most weights are still as they were initialized and most moments are zero, so the archive is small. The
neighbors have no influence on an image yet: the layers behind the attention are zero. After four steps they have.
"""

import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # beside the program of a past day, whose folders are other ones
    from old_root import run
else:
    from tests.laws.golden.old_root import run

TRAIN = ("--dataset", "styles@v2", "--precision", "fp32", "--global-batch", "4", "--k", "2", "--context-norm", "60",
         "--warmup", "0", "--weight-decay", "0", "--log-every", "1", "--model-channels", "32",
         "--head-dim", "16", "--patch", "1", "--image-size", "8", "--tracker", "none", "--attention-downsampling")
SAMPLE = ("--prompt", "a red disc", "--prompt", "a blue box", "--database", "styles@v2", "--k", "2", "--steps", "4",
          "--seed", "3", "--guidance", "8")
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2}]  # floats have four bytes


def make(work: Path) -> None:
    root = work / "root"
    with tarfile.open(Path(__file__).parent / "old_published.tar.gz") as archive:
        archive.extractall(work, filter="data")
    run(root, "train", "tiny", *TRAIN, "--steps", "1")
    run(root, "sample", "tiny", *SAMPLE, "--name", "first")
    shutil.copytree(root / "runs/tiny", work / "tiny")
    run(root, "train", "tiny", *TRAIN, "--steps", "4")
    run(root, "sample", "tiny", *SAMPLE, "--name", "fourth")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work, there = Path(folder), Path(folder) / "root/runs/tiny"
        make(work)
        with lzma.open(sys.argv[1], "wb", filters=FILTERS) as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(work / "tiny", "root/runs/tiny")
            archive.add(there / "metrics.jsonl", "continued/metrics.jsonl")
            archive.add(there / "samples/fourth", "continued/fourth")
