"""Ctrl-C on a terminal, at any moment of any verb that works for a second or longer."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.laws.terminal import interrupt_on_screen

_PROGRAM = [sys.executable, "-m", "jobs"]
_SETTINGS = """[train]
steps = 100000
global_batch = 8
precision = "fp32"
image_size = 16
[train.unet]
model_channels = 32
"""
_TRAIN = "train run --dataset drawn --local --config {settings}"
_SLOW = (_TRAIN, "rebuild art --source {images} --image-size 32 --local", "style mine --source {images}",
         "shard art --source {images} --image-size 32", "embed drawn --overwrite", "search drawn apple", "doctor",
         "sample apple --database drawn --steps 999 --count 50 --local")


@pytest.fixture(scope="module")
def place(trained_root: Path, drawn_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ctrl-c")
    (folder / "settings.toml").write_text(_SETTINGS)
    return {"root": str(trained_root), "images": str(drawn_pictures), "settings": str(folder / "settings.toml")}


def _check(place: dict[str, str], words: str, seconds: float, folder: Path) -> None:
    root = shutil.copytree(place["root"], folder / "root")
    command = words.format(**place).split()
    seen = interrupt_on_screen([*_PROGRAM, *command, "--root", str(root)], seconds)
    text = seen.raw
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert seen.code == 130, text
    assert len(re.findall(r"^(?:\^C)*(?:[\d:]+ train: )?stopped", "\n".join(seen.lines), re.MULTILINE)) == 1, text
    assert text.count("\x1b[?25l") <= text.count("\x1b[?25h"), text  # the cursor is there again


@pytest.mark.parametrize(("words", "seconds"), [("report", 0.3), (_TRAIN, 8.0)])
def test_ctrl_c_ends_a_verb(place: dict[str, str], words: str, seconds: float, tmp_path: Path) -> None:
    _check(place, words, seconds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0])
@pytest.mark.parametrize("words", _SLOW)
def test_ctrl_c_ends_every_verb(place: dict[str, str], words: str, seconds: float, tmp_path: Path) -> None:
    _check(place, words, seconds, tmp_path)
