"""Ctrl-C at any moment, a reader that leaves, a narrow terminal and one without colors."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.laws.terminal import PNG, run_on_screen

_PROGRAM = [sys.executable, "-m", "jobs"]
_COLOR = re.compile(r"\x1b\[[\d;]*(3[0-7]|38|9[0-7])[\d;]*m")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight images and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        (folder / f"{number}.png").write_bytes(PNG.getvalue())
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def _shard(images: Path, root: Path) -> list[str]:
    return [*_PROGRAM, "shard", "art", "--source", str(images), "--image-size", "16", "--root", str(root)]


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5])
def test_ctrl_c_ends_with_one_sentence(tmp_path: Path, seconds: float) -> None:
    urls = tmp_path / "urls.txt"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never answers, so the command cannot be done before
        urls.write_text(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png\n")
        process = subprocess.Popen([*_shard(urls, tmp_path / "root"), "--allow-hosts", "127.0.0.1"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in said
    assert len(re.findall(r"^stopped", said, re.MULTILINE)) == 1


def test_a_narrow_terminal_without_colors_has_a_bar_a_summary_and_the_next_command(images: Path,
                                                                                   tmp_path: Path) -> None:
    seen = run_on_screen([*_shard(images, tmp_path / "root"), "--local"], 40, NO_COLOR="1")
    lines = [line.rstrip() for line in seen.lines]
    assert seen.code == 0 and not _COLOR.search(seen.raw)
    assert any(re.match(r"shard .{8} 100%", line) for line in lines)
    assert max(map(len, lines)) <= 40
    assert "left out: 1 not_a_picture" in seen.raw  # in the line below the bar
    text = "".join(line.ljust(40) if len(line) == 40 else f"{line}\n" for line in lines)
    assert "shard: 8 samples" in text and "1 left out" in text and "next: python -m jobs embed" in text


@pytest.mark.parametrize("words", ["--help", "shard --help-all", "ls", "status", "status --json"])
def test_a_reader_that_leaves_is_no_error(words: str, tmp_path: Path) -> None:
    (tmp_path / "datasets/art/v1").mkdir(parents=True)
    root = "" if "help" in words else f" --root {shlex.quote(str(tmp_path))}"
    command = f"{shlex.quote(sys.executable)} -m jobs {words}{root}"
    done = subprocess.run(["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
