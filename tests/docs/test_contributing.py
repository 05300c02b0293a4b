"""The examples of CONTRIBUTING.md are complete programs that print what the text says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SECTIONS = re.findall(r"^## (Add .*?)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)


def test_there_are_four_examples() -> None:
    assert [title for title, _ in SECTIONS] == ["Add a stage", "Add a source", "Add a sampler", "Add a verb"]


@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_an_example_prints_its_stated_output(title: str, text: str, tmp_path: Path) -> None:
    program, printed = (re.search(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)[1] for kind in ("python", "text"))
    assert program.count("\n") < 60
    (tmp_path / "images").mkdir()
    for name, color in (("a", "blue"), ("b", "green"), ("c", "red")):
        Image.new("RGB", (48, 32), color).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "example.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    ended = subprocess.run([sys.executable, "example.py", "images"], cwd=tmp_path, env=environment, text=True,
                           capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == printed
