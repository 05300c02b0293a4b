"""People get a summary and the next command; programs get JSON."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.checks.settings import check_side
from jobs.cli.parse import parse_command
from jobs.inspection import summary
from jobs.inspection.summary import _FOLLOWING, next_command, next_sample, summarize_rebuild
from jobs.telemetry import output
from model.config import TrainConfig
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from tests.laws.terminal import run_on_screen


class _Stage:
    """The name, the path and the settings of a stage."""

    def __init__(self, name: str, path: str, root: Path | str, database: str = "drawn") -> None:
        self.name, self.path, self.root, self.database = name, path, str(root), database

    def section(self) -> dict[str, Any]:
        return {"database": self.database, "k": 3}


def _next_words(*about: Any) -> list[str]:
    stage: Any = _Stage(*about)
    return shlex.split(next_command(stage))


@pytest.mark.parametrize("name", _FOLLOWING)
def test_the_program_accepts_the_next_command(name: str, trained_root: Path) -> None:
    path = {"neighbors": "datasets/drawn/v1/neighbors/drawn", "score": "datasets/mine/v2/scores/sharp"}.get(
        name, f"runs/small/{name}/x" if name in {"sample", "evaluate", "train", "convert", "import"} else
        f"datasets/mine/v2/{name}")
    words = _next_words(name, path, trained_root)
    assert words[:3] == ["python", "-m", "jobs"]
    parse_command(words[3:])  # exits if a flag or a word is unknown


def _next_training(about: tuple[Any, ...]) -> TrainConfig:
    words = _next_words(*about)[3:]
    assert words[:4] == ["train", "drawn_run", "--dataset", "drawn"]
    return parse_command(words)[1].train


@pytest.mark.parametrize(("width", "height", "image_size"), [
    (64, 64, 0), (48, 48, 0), (256, 256, 64), (200, 200, 40), (100, 100, 0), (75, 75, 0), (256, 128, 0), (100, 60, 0)])
def test_the_next_training_fits_the_images(width: int, height: int, image_size: int, trained_root: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "stored_sizes", lambda _: iter([(width, height)] * 2))
    train = _next_training(("neighbors", "datasets/drawn/v1/neighbors/drawn", trained_root))
    check_side(train, height, width, "")
    assert train.image_size == image_size


def test_images_of_several_sizes_are_searched(trained_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "stored_sizes", lambda _: iter([(64, 64), (64, 48)]))
    assert _next_words("neighbors", "datasets/drawn/v1/neighbors/drawn", trained_root)[3:5] == ["search", "drawn"]


def test_the_next_training_fits_the_vectors_and_has_a_free_name(trained_root: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    about = ("neighbors", "datasets/drawn/v1/neighbors/drawn", shutil.copytree(trained_root, tmp_path / "root"))
    monkeypatch.setattr(summary, "dataset_encoder", lambda _: {"dim": 512})
    assert _next_training(about).unet.context_dim == 512
    (tmp_path / "root/runs/drawn_run").mkdir()
    assert _next_words(*about)[4] == "drawn_run2"
    pointer = {"version": "v2", "number": 2, "sequence": 1, "release": "0", "published": 1.0}
    storage.put_json(pointer, str(tmp_path / "root/datasets/drawn/current.json"))
    assert _next_words(*about)[5:7] == ["--dataset", "drawn@v1"]  # readers of "drawn" would get v2


def test_nothing_follows_the_scores_of_a_published_version(tmp_path: Path) -> None:
    about = ("score", "datasets/mine/v2/scores/sharp", tmp_path)
    assert _next_words(*about)[3:5] == ["index", "mine@v2"]
    storage.put_json({}, str(tmp_path / "datasets/mine/v2/release.json"))
    assert _next_words(*about) == []


def test_latents_are_trained_on_with_neighbors_that_exist(trained_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Dataset.manifest
    monkeypatch.setattr(Dataset, "manifest", lambda self, stage: (
        {"info": {"shape": [1, 4, 36, 36]}} if stage == "latents" else manifest(self, stage)))
    words = _next_words("latents", "datasets/drawn/v1/latents", trained_root)[3:]
    assert words[:6] == ["train", "drawn_run", "--dataset", "drawn", "--database", "drawn"]
    unet = _next_training(("latents", "datasets/drawn/v1/latents", trained_root)).unet
    assert (unet.in_channels, unet.out_channels, 36 % unet.stride, words[-1]) == (4, 4, 0, "--latents")
    assert _next_words("latents", "datasets/flat/v1/latents", trained_root)[3:] == ["neighbors", "flat"]


def test_the_next_command_reads_only_existing_folders(trained_root: Path, tmp_path: Path) -> None:
    assert _next_words("sample", "runs/small/samples/x", trained_root)[3:] == ["evaluate", "small"]
    assert _next_words("train", "runs/small", trained_root)[-2:] == ["--database", "drawn"]
    root = Path(shutil.copytree(trained_root, tmp_path / "root"))
    for name in ("hatched", "outline"):
        shutil.rmtree(root / "datasets" / name)
        shutil.copytree(root / "datasets/drawn", root / "datasets" / name)
    shutil.rmtree(root / "datasets/flat")
    # All captions were seen in training, so nothing is left to evaluate.
    assert _next_words("sample", "runs/small/samples/x", root)[3:] == ["credits", "runs/small/samples/x"]
    for name in ("hatched", "outline"):
        shutil.rmtree(root / "datasets" / name)
    assert _next_words("sample", "runs/small/samples/x", root)[3:] == ["credits", "runs/small/samples/x"]
    assert _next_words("import", "runs/small", root, "gone")[-2:] == ["--database", "drawn"]
    shutil.rmtree(root / "datasets")
    assert _next_words("sample", "runs/small/samples/x", root)[3] == "credits"
    assert _next_words("convert", "runs/small", root) == []


def test_after_a_rebuild_a_run_samples_from_the_database(prepared_root: Path, trained_root: Path) -> None:
    """Without a run of the encoder, `search` works."""
    for root, database, verb in ((prepared_root, "drawn", "search"), (trained_root, "flat", "sample")):
        words = shlex.split(next_sample(str(root), database))
        assert words[3] == verb and database in words
        parse_command(words[3:])


def test_a_terminal_gets_text_and_a_pipe_gets_json(prepared_root: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_root, tmp_path / "root")
    command = [sys.executable, "-m", "jobs", "neighbors", "drawn", "--local", "--root", str(tmp_path / "root")]
    seen = run_on_screen(command, 400)
    lines = [line.rstrip() for line in seen.lines if line.strip()]
    assert seen.code == 0 and lines[-4].startswith("neighbors: ") and "k 20" in lines[-3]
    assert lines[-1] == f"next: python -m jobs train drawn_run --dataset drawn --root {tmp_path / 'root'}"
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    as_json = run_on_screen([*command, "--json"], 400)
    assert json.loads(piped) == json.loads(next(line for line in as_json.lines if line.startswith("{")))
    assert json.loads(piped)["k"] == 20


def test_text_results_have_short_numbers_and_lines(monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    gates = {"lost": 0.016666666666666666, "overlap@10": 0.9400000000000001, "encoder": "that of every consumer " * 3}
    output.print_document({"published": "v2", "gates": gates}, as_json=False)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "published  v2", "gates", "  lost        0.0167", "  overlap@10  0.94",
        "  encoder     " + ("that of every consumer " * 3).rstrip()]
    output.print_document({"recall": 1.0, "share": 0.0, "small": 0.00001234}, as_json=False)
    assert capsys.readouterr().out.split() == ["recall", "1", "share", "0", "small", "1.2e-05"]


def test_a_rebuild_ends_with_counts_and_the_slowest_parts() -> None:
    counts = {"kept": 0, "added": 1300, "changed": 0, "embedded": 1300}
    result = {"dataset": "a", "published": "v1", "unchanged": True, **counts}
    seconds = {"embed": 7.0, "imports": 3.1, "shard": 0.4, "source": 0.6, "index": 0.1, "publish": 0.0}
    assert summarize_rebuild(result, seconds) == {
        "dataset": "a", "published": "v1", "unchanged": True, "rows": "1,300 added, 1,300 embedded",
        "seconds": "11.2: embed 7, imports 3.1, source 0.6, shard 0.4"}
