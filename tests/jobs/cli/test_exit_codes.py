"""Damage below a root ends a command with 1, invalid usage with 2; the commands in hints name the root."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.verbs import VERBS
from jobs.telemetry.output import fit_commands, name_root
from jobs.training.export import BUNDLED
from pipeline import storage


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


@pytest.mark.parametrize("file", ["checkpoint.json", "ema.safetensors"])
def test_a_missing_file_of_a_root_is_named(file: str, root: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "bundled", "--checkpoint", str(BUNDLED), "--root", str(root)]) == 0
    missing, = root.glob(f"runs/bundled/checkpoints/*/{file}")
    missing.unlink()
    capsys.readouterr()
    for words in (["export", "bundled", "--out", str(tmp_path / "out")],
                  ["sample", "bundled", "--prompt", "a red circle", "--database", "drawn", "--steps", "1", "--local"]):
        assert main([*words, "--root", str(root)]) == 1
        said = capsys.readouterr().err
        assert str(missing) in said and "hint: " in said and "nothing that is recorded is lost" not in said, said


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
            text = file.read_text()
            assert not re.search(rf"hint: ({verbs}) ([{{<A-Z]|--)", text), file
            assert not re.search(r"python -m jobs (doctor|recipes|report|status|verify) [a-z]", text), f"{file}: words"
            assert not re.search(r"--root \{(?!storage\.quote\()", text), f"{file}: a root may have a space"


def test_invalid_usage_ends_with_2(root: Path) -> None:
    for command in (["embed", "no-such-dataset"], ["index", "drawn", "--tombstone", "no-such-file"],
                    ["neighbors", "drawn", "--database", "../x"], ["fly"]):
        assert main([*command, "--root", str(root), "--local"]) == 2


@pytest.fixture
def named_root() -> Iterator[str]:
    name_root("a root")
    yield "--root 'a root'"
    name_root("")


@pytest.mark.parametrize("text, expected", [
    ("a\nhint: python -m jobs verify", "a\nhint: python -m jobs verify ROOT"),
    ("hint: python -m jobs rollback n; or python -m jobs rebuild n --source S",
     "hint: python -m jobs rollback n ROOT; or python -m jobs rebuild n --source S ROOT"),
    ("hint: python -m jobs gc n --keep 3 or python -m jobs ls.\n",
     "hint: python -m jobs gc n --keep 3 ROOT or python -m jobs ls ROOT.\n"),
    ("see `python -m jobs ls n` (python -m jobs recipes), which",
     "see `python -m jobs ls n ROOT` (python -m jobs recipes), which"),
    ("next: python -m jobs sample 'it'\"'\"'s a b; c, d' --database n",
     "next: python -m jobs sample 'it'\"'\"'s a b; c, d' --database n ROOT"),
    ("hint: python -m jobs shard n --root HERE --overwrite", "hint: python -m jobs shard n --overwrite ROOT"),
    ("hint: python -m jobs embed n --root HERE2", "hint: python -m jobs embed n --root HERE2"),
    ("hint: python -m jobs submit embed n --root s3://b", "hint: python -m jobs submit embed n --root s3://b"),
    ("hint: --overwrite", "hint: --overwrite"),
])
def test_commands_in_hints_end_with_the_root_as_the_user_wrote_it(text: str, expected: str, named_root: str) -> None:
    here, there = (storage.quote(storage.normalize(name)) for name in ("a root", "a root2"))
    assert fit_commands(text.replace("HERE2", there).replace("HERE", here)) == expected.replace(
        "HERE2", there).replace("ROOT", named_root)


def test_commands_in_hints_have_no_root_if_the_user_wrote_none() -> None:
    assert fit_commands(f"python -m jobs embed n --root {storage.normalize('data')}") == "python -m jobs embed n"
    assert fit_commands("python -m jobs embed n --root /other") == "python -m jobs embed n --root /other"
