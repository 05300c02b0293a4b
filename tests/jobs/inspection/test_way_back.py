"""`verify` names the command that fixes the first fault."""

import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.inspection.way_back import find_command
from pipeline.datasets.dataset import Dataset
from pipeline.releases.signatures import NO_KEYS
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.laws.file_rights import closed
from tests.pipeline import synthetic


def test_the_hint_rebuilds_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = str(tmp_path / "root"), str(tmp_path / "source")
    synthetic.drawings(tmp_path / "source")
    run_stage(Shard(Dataset(root, "art"), ShardConfig(source=(source,), image_size=32)))
    assert main(["verify", "--root", root]) == 0
    assert "hint:" not in capsys.readouterr().err
    next((tmp_path / "root").rglob("*.tar")).unlink()
    assert main(["verify", "--root", root]) == 1
    hint = capsys.readouterr().err.partition("\nhint: python -m jobs ")[2].strip()
    assert hint == f"shard art --source FOLDER --overwrite --root {root}"
    words = hint.replace("FOLDER", source).split()
    assert main([*words, "--image-size", "32", "--local"]) == 0 == main(["verify", "--root", root])


@pytest.mark.parametrize(("path", "way"), [
    ("datasets/art/v1/neighbors/noto/manifest.json", "neighbors art --database noto --overwrite"),
    ("datasets/art/v2/embeddings/000000.npy", "embed art@v2 --overwrite"),
    ("datasets/art/v2/clip-retrieval/manifest.json",
     "rm datasets/art/v2/clip-retrieval; then python -m jobs embed art@v2 --export clip-retrieval"),
    ("datasets/art/v1/forgotten.json", "repair art"),
    ("runs/small/samples/a/samples.json", "rm runs/small/samples/a"),
    ("runs/small/evaluations/a/grid.png", "rm runs/small/evaluations/a"),
    ("pictures/emoji/manifest.json", "demo, after /r/pictures/emoji is removed")])
def test_each_path_has_a_command_that_restores_it(path: str, way: str) -> None:
    assert find_command("/r", [path], NO_KEYS).replace(" --root /r", "") == f"python -m jobs {way}"


def test_no_command_trains_a_damaged_run_again() -> None:
    assert find_command("/r", ["runs/small/plan.json"], NO_KEYS) == (
        "restore /r/runs/small from a backup; or, to remove it with its samples: python -m jobs rm runs/small")


def test_a_dataset_name_of_300_letters_is_invalid_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "datasets/art").mkdir(parents=True)
    for verb, *flags in (["gc"], ["embed", "--local"], ["versions"], ["train", "--dataset", "art", "--local"]):
        assert main([verb, "a" * 300, *flags, "--root", str(tmp_path)]) == 2
        assert "has 300 letters: expected at most 240\nhint: a shorter " in capsys.readouterr().err


@pytest.mark.parametrize("file", ["000000.tar", "records/000000.json", "plan.json", "manifest.json"])
def test_a_file_that_this_user_may_not_read_is_no_damage(file: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset(str(tmp_path / "root"), "art")
    synthetic.drawings(tmp_path / "source")
    run_stage(Shard(dataset, ShardConfig(source=(str(tmp_path / "source"),), image_size=32)))
    path = Path(dataset.folder("shards"), file)
    with closed(path):
        assert main(["verify", "--root", dataset.root]) == 1
    out, err = capsys.readouterr()
    assert "datasets/art/v1/shards" in out and ("may not read" in out or "ermission denied" in out)
    assert f"hint: let this user read {path}" in err


@pytest.mark.parametrize("place", ["tars/a.tar", "root/datasets/art/v1/shards/metadata/000000.parquet"])
def test_a_damaged_dataset_of_adopted_tars_is_adopted_again(place: str, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    root, tars = str(tmp_path / "root"), tmp_path / "tars"
    synthetic.drawings(tmp_path / "source")
    made = Dataset(str(tmp_path / "made"), "art")
    run_stage(Shard(made, ShardConfig(source=(str(tmp_path / "source"),), image_size=32)))
    tars.mkdir()
    for name in ("a", "b"):
        shutil.copy(Path(made.folder("shards"), "000000.tar"), tars / f"{name}.tar")
    assert main(["shard", "art", "--source", str(tars), "--adopt", "--local", "--root", root]) == 0
    capsys.readouterr()
    (tmp_path / place).unlink()
    assert main(["verify", "--root", root]) == 1
    hint = capsys.readouterr().err.partition("\nhint: ")[2].strip()
    again = f"python -m jobs shard art --source FOLDER --adopt --overwrite --root {root}"
    assert hint == (f"restore {tars}/a.tar from a backup; or, to adopt the tars as they are now: {again}"
                    if place.startswith("tars/") else again)
    words = again.removeprefix("python -m jobs ").replace("FOLDER", str(tars)).split()
    assert main([*words, "--local"]) == 0 == main(["verify", "--root", root])
