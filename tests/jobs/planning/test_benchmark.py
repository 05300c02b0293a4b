"""Rates that a trial measured are those of real stages, and `plan` takes them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.planning import rates, synthetic_data
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.training.train_stage import Job
from jobs.training.worker import train_in_processes
from model import recipes
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import Item

SETTINGS = """
recipe = "tiny"
[shard]
image_size = 32
[train]
global_batch = 8
precision = "fp32"
[train.unet]
model_channels = 32
"""


@pytest.fixture
def plan(tmp_path: Path) -> list[str]:
    """A plan of a small network that measures for an instant."""
    (tmp_path / "settings.toml").write_text(SETTINGS)
    return ["plan", "--config", str(tmp_path / "settings.toml"), "--root", str(tmp_path / "root"), "--pictures", "1M",
            "--seconds", "0.2", "--measure", str(tmp_path / "rates.json")]


def test_plan_uses_the_rates_of_a_trial(plan: list[str], drawn_pictures: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*plan, "--local", "--source", str(drawn_pictures)]) == 0
    output = capsys.readouterr().out
    known, base = rates.read(str(tmp_path / "rates.json")), rates.built_in()
    assert "Rates of shard, embed, index, exact, approximate, train: 1 worker on" in output
    for name in ("shard", "embed", "index", "exact", "train"):
        assert getattr(known, name) != getattr(base, name), name
    assert known.shard.image_size == 32 and known.shard.source_bytes == base.shard.source_bytes
    assert known.index.in_parts and known.index.key.startswith("IVF")
    assert not (tmp_path / "root/trial").exists()
    assert main(["plan", *plan[1:7], "--rates", str(tmp_path / "rates.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    embed = document["builds"][0]["stages"][1]
    encoding_seconds = clip.flop_per_image(ClipConfig())[0] / known.embed.flop_per_s
    image_seconds = encoding_seconds + 32 ** 2 * known.embed.preparing_s_per_pixel
    assert embed["worker_hours"] == pytest.approx(1e6 * image_seconds / 3600)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_workers_measure_synthetic_images_on_s3(plan: list[str], s3: str, tmp_path: Path) -> None:
    # The shared cluster's workers do not know the store, so this command starts a new cluster.
    completed = subprocess.run([sys.executable, "-m", "jobs", *plan, "--root", f"{s3}/root", "--measure-workers", "2",
                                "--seconds", "1"], capture_output=True, text=True, timeout=300,
                               env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"})
    assert completed.returncode == 0, completed.stderr
    known = rates.read(str(tmp_path / "rates.json"))
    assert known.machine.startswith("2 workers on") and 100_000 < known.shard.source_bytes < 1_000_000
    assert "train" not in known.defaults and not storage.list_folders(storage.join(s3, "root", "trial"))


@pytest.mark.slow
def test_measured_steps_are_steps_of_training(prepared_root: Path, tmp_path: Path) -> None:
    config = replace(recipes.tiny(), steps=60, global_batch=16, log_every=10, precision="fp32", validate_every=0)
    dataset = Dataset.parse(str(prepared_root), "drawn")
    run = Run.parse(str(tmp_path), "run")
    assert train_in_processes(Job(run, dataset, dataset, replace(config, checkpoint_every=60)))
    lines = read_metrics(run)
    real = (lines[-1]["seconds"] - lines[0]["seconds"]) / 50
    info = run_stage(synthetic_data.Steps(str(tmp_path / "steps"), config, 32, 16, 10 * real, 1))["items"][0]["info"]
    assert info["batch"] <= 16 and info["parameters"] > 1e5
    from model.training import flops
    image_flop = flops.size(config.unet, 32, config.k).training(False)
    assert 1 / 3 < image_flop * 16 / info["flop_per_s"] / real < 3  # the machine may do other things meanwhile


def test_a_network_that_does_not_fit_is_made_narrower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.tiny()
    monkeypatch.setattr(synthetic_data, "machine_memory", lambda: 30 << 20)
    info = run_stage(synthetic_data.Steps(str(tmp_path / "steps"), config, 32, 2, 0.1, 1))["items"][0]["info"]
    assert 20 * info["parameters"] < 15 << 20
    monkeypatch.setattr(synthetic_data, "machine_memory", lambda: 1 << 20)
    with pytest.raises(MemoryError, match="no network of this shape"):
        synthetic_data.Steps(str(tmp_path / "none"), config, 32, 2, 0.1, 1).process(Item("0"), tmp_path)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--gpus", "64"], "there is no GPU here to measure on"),
    (["--from", "nowhere"], "--measure measures here, --from takes what was measured"),
    (["--measure", "nowhere/rates.json"], "there is no such folder to write rates into"),
    (["--seconds", "0"], "plan.seconds = 0.0: must be above 0"),
    (["--memory", "0"], "--memory 0: a worker keeps some of a database"),
    (["--source", "nowhere"], "nowhere"),
])
def test_impossible_measurements_are_refused_before_they_start(plan: list[str], flags: list[str], sentence: str,
                                                               tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([*plan, "--local", *flags])
    except SystemExit as stopped:  # refused while the command line is read
        code = stopped.code
    assert code == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "rates.json").exists()


def test_a_dry_run_prints_the_place_and_does_nothing(plan: list[str], tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*plan, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"].startswith(f"{tmp_path / 'root' / 'trial'}/")
    assert not (tmp_path / "root").exists()
