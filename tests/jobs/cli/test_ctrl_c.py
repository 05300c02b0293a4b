"""Ctrl-C on a terminal, at any moment of any verb that works for a second or longer."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.laws.terminal import interrupt_on_screen

_PROGRAM = [sys.executable, "-m", "jobs"]
_SETTINGS = '[train]\nsteps = 100000\nglobal_batch = 8\nprecision = "fp32"\nimage_size = 16\n[train.unet]\nmodel_channels = 32\n'
_FAST = {
    "status": (0.0, 0.1),
    "train run --dataset drawn --local --config {settings}": (4.0, 9.0),
    "rebuild art --source {images} --image-size 32 --local": (5.0,),
}
_MOMENTS = (0.2, 1.0, 2.0, 3.5, 6.0)
_SLOW = (
    "pipeline some --source {images} --image-size 32 --local",
    "pipeline some --source {images} --image-size 32",
    "rebuild art --source {images} --image-size 32",
    "style mine --source {images}",
    "shard art --source {images} --image-size 32",
    "embed drawn --overwrite", "embed drawn --overwrite --local", "index drawn --overwrite --local",
    "neighbors drawn --overwrite --local",
    "train run --dataset drawn --config {settings}",
    "train run --dataset drawn --local --config {settings}",
    "sample small --prompt apple --database drawn --steps 2000 --local",
    "evaluate small --database drawn --database flat --local",
    "search drawn apple", "show 0000000000", "report", "verify", "doctor", "ls", "versions drawn", "gc --dry-run",
    "export small --out {out}", "plan drawn", "status --serve 0", "demo --local",
)


@pytest.fixture(scope="module")
def place(trained_root: Path, drawn_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ctrl-c")
    (folder / "settings.toml").write_text(_SETTINGS)
    return {"root": str(trained_root), "images": str(drawn_pictures), "settings": str(folder / "settings.toml")}


def _check(place: dict[str, str], words: str, seconds: float, folder: Path) -> None:
    """A command that Ctrl-C stops, or that had ended before."""
    root = shutil.copytree(place["root"], folder / "root")
    command = words.format(**place, out=folder / "out").split()
    seen = interrupt_on_screen([*_PROGRAM, *command, "--root", str(root)], seconds)
    text = seen.raw
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert seen.code == 130, text
    assert len(re.findall(r"^(?:\^C)*stopped", "\n".join(seen.lines), re.MULTILINE)) == 1, text
    assert text.count("\x1b[?25l") <= text.count("\x1b[?25h"), text  # the cursor is there again


@pytest.mark.parametrize(("words", "seconds"), [(words, moment) for words in _FAST for moment in _FAST[words]])
def test_ctrl_c_ends_a_verb(place: dict[str, str], words: str, seconds: float, tmp_path: Path) -> None:
    _check(place, words, seconds, tmp_path)
