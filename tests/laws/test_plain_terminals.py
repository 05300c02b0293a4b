"""Every verb on a narrow or plain terminal, and with a reader that leaves, as `head` does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.verbs import VERBS
from tests.laws.golden import archives
from tests.laws.terminal import check_verbs, run_on_terminal

_NO_CHEAP_RUN = {
    "doctor": "it asks the network and starts Ray",
    "sample": "it loads a model", "evaluate": "it loads a model", "train": "it loads a model",
    "convert": "it loads a model", "export": "it loads a model", "latents": "it loads a model",
    "credits": "its samples are made by a model",
    **dict.fromkeys(("rollback", "repair", "gc"), "nothing of the root is published")}
"""Verbs of which only the help is tried here."""
# One process forks for each command, because a process needs seconds to import. The child's stdout has no reader.
_CLOSED = """
import json, os, sys
import tyro
from jobs.cli.main import main
for words in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        ours, theirs = os.pipe()
        os.close(ours)
        os.dup2(theirs, 1)
        code = main(words)
        print("EXIT", code, file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> Path:
    """A folder with a root and images."""
    folder = tmp_path_factory.mktemp("plain")
    archives.unpack(archives.ROOT, folder)
    (folder / "images").symlink_to(drawn_pictures / "flat")
    return folder


def _cheap(place: Path) -> list[list[str]]:
    """Commands with little work that end with 0."""
    source = ["--source", str(place / "images"), "--dry-run", "--local"]
    dry = ["--dry-run", "--local"]
    commands = [
        *([verb, "new", *source] for verb in ("shard", "pipeline", "rebuild", "style")),
        ["embed", "art", *dry], ["index", "art", "--key", "IVF4,SQ8", *dry],
        ["neighbors", "art", "--database", "art", "--k", "3", *dry],
        ["score", "art", "--head", "a=json:dumps", *dry], ["demo", "--drawn", *dry],
        ["submit", *dry[:1], "embed", "art"],
        ["plan"], ["recipes"], ["ls"], ["ls", "art"], ["status"], ["verify", "--quick"], ["versions", "art"],
        ["show", "0000000001", "--dataset", "art"], ["search", "art", "a"], ["report", *dry[:1]],
        ["rm", "half", *dry[:1]], ["forget", "--key", "art/0000000001", *dry[:1]]]
    settings = place / "demo.toml"
    settings.unlink(missing_ok=True)
    return [*([*words, "--root", str(place / "root")] for words in commands), ["init", "demo", str(settings)]]


def _helps() -> list[list[str]]:
    return [["--help"], *([verb, "--help"] for verb in VERBS)]


def test_every_verb_is_tried(place: Path) -> None:
    assert {words[0] for words in _cheap(place)} | _NO_CHEAP_RUN.keys() == VERBS.keys()


@pytest.mark.slow
def test_40_columns_without_colors(place: Path) -> None:
    """Escape sequences are in no output. Boxes fit the terminal, and names in tables are not cut."""
    shown = check_verbs([*_helps(), *_cheap(place)], columns=40)
    assert not {words: said for words, said in shown.items() if "EXIT 0" not in said}
    assert not [line for said in shown.values() for line in said.splitlines() if line[:1] in set("│╭╰") and
                len(line) > 40]
    assert re.search(r"^datasets/art/v1/text_embeddings ", shown["status --root"], re.MULTILINE)
    assert re.search(r"^neighbors, exact ", shown["plan --root"], re.MULTILINE)


def test_no_color_holds_on_a_terminal_with_colors(place: Path) -> None:
    colors = re.compile("\x1b\\[[0-9;]*[34][0-9]")
    said = run_on_terminal([["embed", "--help"], ["embed"], *_cheap(place)[-4:-1]], "xterm-256color", NO_COLOR="1")
    assert not colors.search(said)
    assert colors.search(run_on_terminal([["embed", "--help"]], "xterm-256color"))


@pytest.mark.slow  # test_main.py has a few of these verbs
def test_a_reader_that_leaves_is_no_fault(place: Path) -> None:
    commands = [["embed", "--help"], *_cheap(place)]
    process = subprocess.run([sys.executable, "-c", _CLOSED, json.dumps(commands)], capture_output=True, text=True,
                             env=os.environ | {"TERM": "dumb"})
    assert "Traceback" not in process.stderr and "error: " not in process.stderr, process.stderr
    codes = re.findall("^EXIT (.*)$", process.stderr, re.MULTILINE)
    assert codes == ["0"] * len(commands), process.stderr
