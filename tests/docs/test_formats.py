"""Each line of docs/reference/formats.md reads the file that its section names."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from model.weights import compvis, first_stage
from tests.docs.pages import ROOT, read_page, split_page

_PAGE = Path("docs/reference/formats.md")
_BLOCKS = [block for block in split_page(read_page(_PAGE))[1] if block.language == "python"]
_GOLDEN = ROOT / "tests/model/weights/golden/compvis_small.safetensors"
_SETTINGS = """[train]
steps = 2
global_batch = 4
k = 2
precision = "fp32"
image_size = 16
checkpoint_every = 2
log_every = 1
[train.unet]
model_channels = 32
"""
_HEAD = """import numpy

def score(shard):
    return numpy.arange(len(shard.keys), dtype=numpy.float32)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a file of each kind: twelve images, a run of two steps, a published dataset."""
    place = tmp_path_factory.mktemp("formats")
    (place / "images").mkdir()
    colors = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(colors.integers(0, 255, (16, 16, 3), np.uint8)).save(place / f"images/{number}.png")
        (place / f"images/{number}.txt").write_text(f"image {number}")
    (place / "images/broken.png").write_text("no image")
    (place / "settings.toml").write_text(_SETTINGS)
    (place / "warmth_head.py").write_text(_HEAD)
    (place / "hidden.txt").write_text("0000000003\n")
    weights = {name: tensor.float() for name, tensor in compvis.read(_GOLDEN).first_stage.items()}
    first_stage.build(compvis.first_stage_config(weights),
                      compvis.first_stage_weights(weights)).network.save_pretrained(place / "first-stage")
    commands = [
        ["shard", "mine", "--source", str(place / "images"), "--image-size", "16"],
        ["embed", "mine"], ["score", "mine", "--head", "warmth=warmth_head:score"], ["index", "mine"],
        ["neighbors", "mine", "--k", "2", "--vectors", "--copy-similarity", "1"],
        ["latents", "mine", "--first-stage", str(place / "first-stage"), "--flips"],
        ["train", "myrun", "--dataset", "mine", "--config", str(place / "settings.toml")],
        ["sample", "myrun", "--prompt", "image 1", "--database", "mine", "--k", "2", "--steps", "2"],
        ["index", "mine", "--tombstone", str(place / "hidden.txt")],
        ["rebuild", "art", "--source", str(place / "images"), "--image-size", "16", "--max-failed", "0.5"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        for command in commands:
            assert main([*command, "--root", str(place / "data"), "--local"]) == 0, command
    return place / "data"


def test_each_line_reads_its_file(root: Path) -> None:
    folder = {"root": str(root), "samples": next((root / "runs/myrun/samples").iterdir()).name}
    names: dict[str, Any] = dict(folder)
    exec(_BLOCKS[0].lines[0], names)
    results = {}
    for block in _BLOCKS[1:]:
        (line,) = block.lines
        result = results[line] = eval(line, names)
        assert result.size if isinstance(result, np.ndarray) else result, f"{_PAGE}:{block.line}: {line}: {result!r}"
    values = {line.split("/")[-1].split('"')[0]: value for line, value in results.items()}
    assert values["manifest.json"] == 12 and values["rows.npy"].tolist() == [3]
    assert values["000000.ids.npy"].shape == (12, 2) and values["current.json"] == "v1"
    rows = results[next(line for line in results if '"status"' in line)]
    assert [row["status"] for row in rows].count("success") == 12


def test_the_page_has_only_expressions() -> None:
    for block in _BLOCKS[1:]:
        ast.parse(block.lines[0], mode="eval")
