"""The image of the pipeline: every stage with what it wrote in a root of the demo.

    python tests/bench/images/pipeline.py --root data/demo --out docs/images/pipeline.png

The root must have been made by `python -m jobs demo`. The script reads the files as docs/reference/formats.md says.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

_INK, _QUIET, _LINE, _ACCENT = "#1d2129", "#667080", "#ccd2da", "#2a6292"
_SIDE = 64
_QUERY = "strawberry"
_STYLES = ("noto", "openmoji", "fluent-emoji-flat", "emojione-monotone")
_PROMPTS = ("00-red-apple", "04-red-heart")


class Rows:
    """The images of a dataset by global row."""

    def __init__(self, dataset: Path) -> None:
        self._places: list[tuple[Path, str]] = []
        self.captions: list[str] = []
        for table in sorted((dataset / "shards").glob("*.parquet")):
            for row in parquet.read_table(table, columns=["key", "status", "caption"]).to_pylist():
                if row["status"] == "success":
                    self._places.append((table.with_suffix(".tar"), row["key"]))
                    self.captions.append(row["caption"])

    def image(self, row: int) -> Image.Image:
        """The image of a global row."""
        tar, key = self._places[row]
        with tarfile.open(tar) as members:
            member = members.extractfile(f"{key}.png")
            assert member
            return Image.open(io.BytesIO(member.read())).convert("RGB")


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """The images side by side, with white between them."""
    step = _SIDE + 8
    sheet = Image.new("RGB", (columns * step, -(-len(images) // columns) * step), "white")
    for place, image in enumerate(images):
        sheet.paste(image.resize((_SIDE, _SIDE)), (place % columns * step + 4, place // columns * step + 4))
    return sheet


def draw_stages(axes: list[Axes], root: Path) -> None:
    """Plot the files of each stage, in the order of the pipeline."""
    train = root / "datasets/train/v1"
    rows = Rows(train)
    axes[0].imshow(grid([rows.image(row) for row in range(40, 10000, 830)], 4))
    axes[0].set_xlabel("tars with image,\ncaption and metadata")
    vectors = np.load(train / "embeddings/000000.npy")
    axes[1].imshow(vectors[:48, :48].astype(np.float32), cmap="PuBu_r")
    axes[1].set_xlabel(f"{vectors.shape[1]} numbers (CLIP)\nfor each image")
    infos = json.loads((train / "index/index_infos.json").read_text())
    axes[2].text(.5, .5, "\n".join(infos["index_key"].split(",")), ha="center", va="center", fontsize=12, color=_INK,
                 linespacing=1.8, transform=axes[2].transAxes)
    axes[2].set_xlabel(f"{infos['nb vectors']:,} vectors\nin {infos['size in bytes'] / 1e6:.1f} MB")
    files = sorted((train / "neighbors/train").glob("*.ids.npy"))
    query = rows.captions.index(_QUERY)
    ids = np.concatenate([np.load(file) for file in files])[query, :8]
    blank = Image.new("RGB", (_SIDE, _SIDE), "white")
    axes[3].imshow(grid([rows.image(query), blank, blank, blank, *(rows.image(int(row)) for row in ids)], 4))
    axes[3].set_xlabel("for each image (top)\nthe nearest others")
    lines = [json.loads(line) for line in (root / "runs/demo/metrics.jsonl").read_text().splitlines()]
    axes[4].plot([line["step"] for line in lines], [line["loss"] for line in lines], color=_ACCENT)
    axes[4].set_xlabel("a network sees each image\nwith its neighbors: loss")
    samples = max((root / "runs/emoji_32/samples").iterdir(), key=lambda folder: folder.stat().st_mtime)
    axes[5].imshow(grid([Image.open(samples / style / f"{prompt}.png").convert("RGB") for style in _STYLES
                         for prompt in _PROMPTS], 2))
    axes[5].set_xlabel("two prompts,\nfour databases")


def main() -> None:
    """Parse the command line and write the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/pipeline.png"))
    options = parser.parse_args()
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.6), gridspec_kw={"wspace": .34})
    for number, (place, name) in enumerate(zip(axes, ("shard", "embed", "index", "neighbors", "train", "sample"),
                                               strict=True)):
        place.set_title(name, fontsize=15, fontweight="bold", color=_INK, pad=10)
        place.set_box_aspect(1)
        place.set(xticks=[], yticks=[])
        place.xaxis.label.set(fontsize=11, color=_QUIET)
        for spine in place.spines.values():
            spine.set_color(_LINE)
        if number:
            place.annotate("", (-.05, .5), (-.29, .5), xycoords="axes fraction",
                           arrowprops={"arrowstyle": "-|>", "color": _QUIET, "lw": 1.6})
    draw_stages(list(axes), options.root)
    figure.savefig(options.out, dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
