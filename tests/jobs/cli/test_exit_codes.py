"""Damage below a root ends a command with 1, invalid usage with 2; the commands in hints name the root."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.parse import VERBS
from jobs.telemetry.output import add_root


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared_root, tmp_path / "a root")
    return tmp_path / "a root"


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("file, command", [
    ("shards/manifest.json", ["embed", "drawn", "--overwrite"]), ("shards/plan.json", ["shard", "drawn"]),
    ("embeddings/manifest.json", ["index", "drawn", "--overwrite"]),
    ("embeddings/manifest.json", ["neighbors", "drawn", "--database", "drawn", "--overwrite"]),
    ("shards/000000.parquet", ["neighbors", "drawn", "--database", "drawn", "--overwrite", "--k", "3"]),
    ("shards/manifest.json", ["train", "run", "--dataset", "drawn"]),
    ("neighbors/drawn/manifest.json", ["train", "run", "--dataset", "drawn"]),
    ("shards/manifest.json", ["verify"]),
])
def test_damaged_data_ends_with_1(root: Path, file: str, command: list[str],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "datasets/drawn/v1" / file
    if path.suffix == ".json":
        path.write_bytes(b"{")
    else:
        path.write_bytes(path.read_bytes()[:-1])
    source = ["--source", str(root)] if command[0] == "shard" else []
    assert main([*command, *source, "--root", str(root), "--local"]) == 1
    output = capsys.readouterr()
    assert path.name in output.out + output.err and "Traceback" not in output.err
    for hinted in re.findall(r"python -m jobs [^;\n]*", output.err.partition("hint: ")[2]):
        assert shlex.split(hinted).count("--root") == 1 and str(root) in shlex.split(hinted)


def test_the_command_of_a_hint_works(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "datasets/drawn/v1/shards/manifest.json").write_bytes(b"{")
    assert main(["embed", "drawn", "--overwrite", "--root", str(root), "--local"]) == 1
    hinted = shlex.split(capsys.readouterr().err.partition("hint: ")[2])
    assert hinted[:3] == ["python", "-m", "jobs"]
    assert main(hinted[3:]) == 1  # verify finds the damage
    assert "datasets/drawn/v1/shards" in capsys.readouterr().out


def test_every_hint_spells_its_command_in_full() -> None:
    verbs = "|".join(VERBS)
    for package in ("jobs", "pipeline", "model"):
        for file in (Path(__file__).parents[3] / package).rglob("*.py"):
            assert not re.search(rf"hint: ({verbs}) ([{{<A-Z]|--)", file.read_text()), file


def test_invalid_usage_ends_with_2(root: Path) -> None:
    for command in (["embed", "no-such-dataset"], ["index", "drawn", "--tombstone", "no-such-file"],
                    ["neighbors", "drawn", "--database", "../x"], ["fly"]):
        assert main([*command, "--root", str(root), "--local"]) == 2


@pytest.mark.parametrize("text, expected", [
    ("a\nhint: python -m jobs verify", "a\nhint: python -m jobs verify --root /r"),
    ("hint: python -m jobs rollback n; or python -m jobs rebuild n --source S",
     "hint: python -m jobs rollback --root /r n; or python -m jobs rebuild --root /r n --source S"),
    ("hint: python -m jobs embed n --root /other", "hint: python -m jobs embed n --root /other"),
    ("hint: python -m jobs submit embed n --root s3://b", "hint: python -m jobs submit embed n --root s3://b"),
    ("hint: --overwrite", "hint: --overwrite"),
])
def test_commands_in_hints_name_the_root(text: str, expected: str) -> None:
    assert add_root(text, "/r") == expected
    assert add_root(text, "") == text
