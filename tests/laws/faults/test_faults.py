"""All stages of the demo, while the driver and the cluster are killed between and during stages, and on S3."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.demo_stages import make_demo
from jobs.cli.main import main
from jobs.cli.model import train
from jobs.config.recipes import tiny
from jobs.config.settings import Settings
from jobs.inspection import status
from pipeline import storage
from pipeline.stages.driver import run_in_process
from pipeline.stages.manifest import read_manifest, without_run_facts
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Outcome
from pipeline.versions import verify

UNINDEXED = "datasets/heldout/v1/index"  # the held-out images are queries only
# The stages are the demo's, with a corpus and a network that take seconds.
SETTINGS = """
[pictures]
size = 32
pictures_per_item = 40
[shard]
samples_per_shard = 40
[train]
steps = 12
global_batch = 8
log_every = 2
checkpoint_every = 4
precision = "fp32"
[train.unet]
model_channels = 32
head_dim = 16
[sample]
steps = 4
k = 2
"""


def _arguments(root: Path | str, settings: Path, *more: str) -> list[str]:
    return ["demo", "--root", str(root), "--drawn", "--subjects", "20", "--config", str(settings), *more]


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("settings") / "settings.toml"
    file.write_text(SETTINGS)
    return file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings_file: Path) -> Path:
    """The root of an undisturbed demo in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert main(_arguments(root, settings_file, "--local")) == 0
    return root


def _manifests(root: str) -> dict[str, Any]:
    return {stage_status["path"]: without_run_facts(read_manifest(storage.join(root, stage_status["path"]), ""))
            for stage_status in status.read_status(root) if stage_status["path"] != UNINDEXED}


def test_the_demo_seals_everything_and_a_second_one_does_nothing(undisturbed: Path, settings_file: Path) -> None:
    states = {stage_status["path"]: stage_status["state"] for stage_status in status.read_status(str(undisturbed))}
    assert states.pop(UNINDEXED) == "absent" and set(states.values()) == {"sealed"}
    # Images, datasets with and without an index, neighbors of training's and of held-out ones, run, samples.
    assert len(states) == 1 + 7 * 3 + 2 + 2 + 2
    times = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert main(_arguments(undisturbed, settings_file, "--local")) == 0
    assert times == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert not [fault for stage_status in status.read_status(str(undisturbed)) if stage_status["path"] != UNINDEXED
                for fault in verify.find_faults(str(undisturbed), stage_status["path"])]
    assert (undisturbed / "report.html").stat().st_size > 50_000


def test_no_held_out_subject_is_in_training(undisturbed: Path) -> None:
    import pyarrow.parquet as pq
    training, styles = ([row for path in (undisturbed / "datasets" / name).rglob("*.parquet")
                         for row in pq.read_table(path).to_pylist()] for name in ("train", "flat"))
    assert training and {row["held_out"] for row in training} == {"0"}
    held_out = {row["subject"] for row in styles if row["held_out"] == "1"}
    assert len(held_out) == 2 and not held_out & {row["subject"] for row in training}


def test_samples_name_prompt_seed_checkpoint_and_neighbors(undisturbed: Path) -> None:
    folder = next((undisturbed / "runs/demo/samples").iterdir())
    document = storage.read_json(str(folder / "samples.json"))
    assert len(document["pictures"]) == len(document["prompts"]) * 6
    sample = document["pictures"][0]
    assert (sample["prompt"], sample["seed"], sample["checkpoint"]["step"]) == (document["prompts"][0], 0, 12)
    assert len(sample["neighbors"]) == 2 and sample["neighbors"][0]["score"] >= sample["neighbors"][1]["score"]
    assert (folder / sample["file"]).exists() and (folder / "grid.png").exists()


@pytest.mark.parametrize("way", [pytest.param(("--local",), marks=pytest.mark.slow),
                                 pytest.param((), marks=[pytest.mark.ray, pytest.mark.slow])],
                         ids=["local", "ray"])
def test_the_driver_killed_again_and_again_gives_the_same_manifests(
        way: tuple[str, ...], undisturbed: Path, tmp_path: Path, settings_file: Path,
        request: pytest.FixtureRequest) -> None:
    if not way:
        request.getfixturevalue("cluster")
    root = tmp_path / "root"
    command = [sys.executable, "-m", "jobs", *_arguments(root, settings_file, *way)]
    # Killed during a stage: after its plan, and after its first record.
    moments = [("datasets/train/v1/embeddings", "records/000000.json")]
    if way:  # starting is cheap without Ray
        moments = [("pictures/drawn", "plan.json"), *moments, ("runs/demo", "checkpoints/0000004/manifest.json")]
    for path, name in moments:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _wait_for_file(root / path / name, process)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    actual, expected = _manifests(str(root)), _manifests(str(undisturbed))
    if not way:
        # Two workers add their gradients in another order than one: the run is compared by its data.
        actual, expected = ({path: manifest for path, manifest in manifests.items() if not path.startswith("runs/")}
                            for manifests in (actual, expected))
    assert actual == expected


def _wait_for_file(path: Path, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 200
    while not path.exists() and time.monotonic() < end:
        assert process.poll() is None, f"ended with {process.returncode} before {path} was there"
        time.sleep(0.01)


@pytest.fixture
def doomed_cluster() -> Iterator[Any]:
    """A Ray cluster in a new session, so that all its processes can be killed."""
    from ray.cluster_utils import Cluster
    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 100 << 20,
                                                                "include_dashboard": False})
    yield ray_cluster
    ray_cluster.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_another_cluster_continues_after_the_first_was_killed(undisturbed: Path, tmp_path: Path, settings_file: Path,
                                                              doomed_cluster: Any) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-m", "jobs", *_arguments(root, settings_file)]
    environment = os.environ | {"RAY_ADDRESS": doomed_cluster.address, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _wait_for_file(root / "datasets/train/v1/embeddings/records/000000.json", process)
    for node in doomed_cluster.list_all_nodes():
        for processes in node.all_processes.values():
            for process_info in processes:
                os.kill(process_info.process.pid, signal.SIGKILL)
    assert process.wait(120) != 0
    assert main(_arguments(root, settings_file, "--local")) == 0
    assert _manifests(str(root)) == _manifests(str(undisturbed))


@pytest.mark.slow
def test_s3_holds_the_same_bytes_as_a_local_disk(undisturbed: Path, s3: str, settings_file: Path) -> None:
    root = f"{s3}/root"
    assert main(_arguments(root, settings_file, "--local")) == 0
    assert _manifests(root) == _manifests(str(undisturbed))
    assert not [fault for stage_status in status.read_status(root) if stage_status["path"] != UNINDEXED
                for fault in verify.find_faults(root, stage_status["path"])]
    assert main(_arguments(root, settings_file, "--local")) == 0


def test_without_npm_the_demo_warns_and_uses_the_drawn_corpus(tmp_path: Path, settings_file: Path, monkeypatch,
                                                              caplog) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    settings = replace(_settings(settings_file), train=replace(tiny().train, steps=1))
    with pytest.raises(KeyError, match="stop here"):
        make_demo(str(tmp_path), settings, _stops_after_pictures, without_emoji=False, dry_run=False, train=train)
    assert "synthetic images, because the emoji are not available" in caplog.text
    assert status.read_status(str(tmp_path))[0]["path"] == "pictures/drawn"


def _settings(file: Path) -> Settings:
    from jobs.config.toml import resolve_settings
    settings = resolve_settings("", str(file))
    return replace(settings, pictures=replace(settings.pictures, subjects=4))


def _stops_after_pictures(stage: Stage, items: list[Item]) -> Iterator[Outcome]:
    if stage.name != "pictures":
        raise KeyError("stop here")
    return run_in_process(stage, items)
