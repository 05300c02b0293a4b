"""A run that was killed, moved or divided among processes gives the result of an undisturbed run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jobs.cli.main import main
from jobs.cli.model import train as train_run
from jobs.config.recipes import tiny
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.training.train_stage import Job, Training
from jobs.training.validation import Validation
from jobs.training.worker import train_in_processes, train_process
from model.config import TrainConfig
from model.training.train import train
from pipeline import storage
from pipeline.batches.batches import Batches
from pipeline.datasets.dataset import Dataset
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import prepare, replace_plan
from pipeline.takedowns.takedowns import hide_rows
from tests.pipeline import synthetic

SETTINGS = """
[train]
steps = 24
global_batch = 8
log_every = 1
checkpoint_every = 5
warmup = 5
precision = "fp32"
[train.unet]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_downsampling = [2]
head_dim = 16
patch = 4
context_dim = 256
"""


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    """A copy of the prepared root."""
    shutil.copytree(prepared_root, tmp_path / "root")
    (tmp_path / "root/settings.toml").write_text(SETTINGS)
    return tmp_path / "root"


def _config(**changes: Any) -> TrainConfig:
    small = replace(tiny().train.unet, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                    attention_downsampling=(2,), head_dim=16, patch=4, context_dim=256)
    return replace(tiny().train, **{"steps": 24, "global_batch": 8, "log_every": 1, "checkpoint_every": 5, "warmup": 5,
                                    "precision": "fp32", "unet": small} | changes)


def _command(root: Path, run: str, *flags: str) -> list[str]:
    return ["-m", "jobs", "train", run, "--dataset", "drawn", "--root", str(root), "--config",
            str(root / "settings.toml"), *flags]


def _curve(root: Path, run: str) -> list[tuple[int, float]]:
    lines = (root / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


def _wait_for_step(root: Path, run: str, step: int, process: "subprocess.Popen[bytes] | None",
                   seconds: float = 120) -> None:
    path = root / "runs" / run / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} never reached step {step}")


def _undisturbed_curve(root: Path) -> list[tuple[int, float]]:
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "undisturbed"), dataset, dataset, _config())
    assert train_in_processes(job)
    run_stage(Training(job))
    return _curve(root, "undisturbed")


@pytest.mark.slow
def test_a_killed_and_restarted_run_has_the_same_curve(root: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, *_command(root, "whole", "--local")], check=True, env=environment)
    for step in (3, 12):  # before the first checkpoint, and between two
        process = subprocess.Popen([sys.executable, *_command(root, "killed", "--local")], env=environment,
                                   stderr=subprocess.DEVNULL)
        _wait_for_step(root, "killed", step, process)
        process.kill()
        process.wait()
        assert not (root / "runs" / "killed" / "manifest.json").exists()
    completed = subprocess.run([sys.executable, *_command(root, "killed", "--local")], env=environment,
                               capture_output=True)
    assert completed.returncode == 0, completed.stderr
    assert _curve(root, "killed") == _curve(root, "whole")
    assert len(_curve(root, "whole")) == 24
    killed_run, whole_run = (Run.parse(str(root), name) for name in ("killed", "whole"))
    assert killed_run.checkpoint(24)["files"] == whole_run.checkpoint(24)["files"]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow)
                                                     for number in (signal.SIGINT, signal.SIGHUP))])
def test_a_signal_saves_a_checkpoint(root: Path, number: int) -> None:
    process = subprocess.Popen([sys.executable, *_command(root, f"stopped{number}", "--local", "--steps", "5000",
                                                          "--checkpoint-every", "100000")])
    _wait_for_step(root, f"stopped{number}", 7, process)
    process.send_signal(number)
    assert process.wait(60) == 130
    steps = Run.parse(str(root), f"stopped{number}").steps()
    assert len(steps) == 1 and steps[0] >= 7


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_with_ray_workers_continues_after_ctrl_c_and_after_sigterm(root: Path, cluster: Any) -> None:
    command = [sys.executable, *_command(root, "ray-stopped", "--checkpoint-every", "100000")]
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([*command, "--steps", "5000"], stderr=subprocess.PIPE, text=True)
        _wait_for_step(root, "ray-stopped", reached + 7, process, seconds=300)
        process.send_signal(number)
        _, log = process.communicate(timeout=60)
        *_, step = Run.parse(str(root), "ray-stopped").steps()
        assert process.returncode == 130 and step >= reached + 7, log
        assert f"train: stopped at step {step}; the same command continues from there" in log
        assert [line for line, _ in _curve(root, "ray-stopped")] == list(range(1, step + 1))  # none lost, none twice
        reached = step
    subprocess.run([*command, "--steps", str(reached + 2)], check=True, stderr=subprocess.PIPE)
    curve, undisturbed = _curve(root, "ray-stopped"), _undisturbed_curve(root)
    assert [step for step, _ in curve] == list(range(1, reached + 3))
    count = min(len(curve), len(undisturbed))
    assert [loss for _, loss in curve[:count]] == pytest.approx([loss for _, loss in undisturbed[:count]], rel=2e-3)
    assert read_manifest(str(root / "runs/ray-stopped"), "")["info"]["steps"] == reached + 2


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers_one_killed_equal_torchrun_and_one_process(root: Path, cluster: Any) -> None:
    expected_curve = _undisturbed_curve(root)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                    *_command(root, "torchrun")], check=True, stderr=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen([sys.executable, *_command(root, "ray")], stderr=subprocess.PIPE)
    _wait_for_step(root, "ray", 8, process)
    victims = _train_workers(cluster)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log.decode()
    assert _curve(root, "ray") == _curve(root, "torchrun")
    assert [step for step, _ in expected_curve] == [step for step, _ in _curve(root, "ray")]
    assert [loss for _, loss in expected_curve] == pytest.approx([loss for _, loss in _curve(root, "ray")], rel=2e-3)
    assert read_manifest(str(root / "runs" / "ray"), "")["info"]["steps"] == 24
    assert not (root / "runs" / "ray" / "ray").exists()


def _train_workers(cluster: Any) -> list[int]:
    """Processes of Ray Train's workers that this cluster's raylets have started."""
    raylets = {process_info.process.pid for node in cluster.list_all_nodes()
               for processes in node.all_processes.values() for process_info in processes}
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, stat = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        if b"RayTrainWorker" in name and int(stat.rpartition(")")[2].split()[1]) in raylets:
            pids.append(int(path.name))
    return sorted(pids)


def test_other_settings_on_a_run_are_refused_by_name(root: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "run"), dataset, dataset, _config(steps=2))
    assert train_in_processes(job)
    with pytest.raises(ValueError, match=r"section\.train\.lr: there 0\.\d+, now 0\.1"):
        train_in_processes(replace(job, config=_config(steps=2, lr=0.1)))
    with pytest.raises(ValueError, match=r"--context-dim 256"):
        prepare(Training(Job(Run.parse(str(root), "other"), dataset, dataset,
                                   _config(unet=replace(_config().unet, context_dim=64)))))


def test_a_checkpoint_without_manifest_is_not_read(root: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "cut"), dataset, dataset, _config(steps=10))
    assert train_in_processes(job)
    storage.remove(storage.join(job.run.folder, "checkpoints", "0000010", "manifest.json"))
    (root / "runs" / "cut" / "checkpoints" / "0000010" / "model.safetensors").write_bytes(b"half")
    assert job.run.latest_step() == 5
    assert train_process(job) == 10
    job.run.fetch(10)


@pytest.mark.slow
def test_true_neighbors_give_a_lower_loss_than_those_of_other_images(prepared_root: Path) -> None:
    dataset = Dataset.parse(str(prepared_root), "drawn")
    config = _config(steps=300, global_batch=16, log_every=100, checkpoint_every=10_000, lr=1e-3, warmup=20)
    losses = {}
    for true in (True, False):
        batches = Batches(dataset, dataset, k=config.k, global_batch=16, seed=0, true_neighbors=true)
        records: list[dict[str, Any]] = []
        train(config, batches.at, device="cpu", save=lambda *_: None, log=records.append)
        losses[true] = records[-1]["loss"]
    assert losses[True] < 0.97 * losses[False], losses


def test_a_finished_run_is_given_more_steps(root: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "longer"), dataset, dataset, _config(steps=6))
    whole = Job(Run.parse(str(root), "whole"), dataset, dataset, _config(steps=12))
    assert train_run(job, tiny().cluster, local=True)["info"]["steps"] == 6
    longer = train_run(replace(job, config=_config(steps=12)), tiny().cluster, local=True)
    assert longer["info"] == train_run(whole, tiny().cluster, local=True)["info"]
    assert train_run(job, tiny().cluster, local=True) == longer


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(root: Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "damaged"), dataset, dataset, _config(steps=10))
    assert train_in_processes(job)
    whole = job.run.checkpoint(10)
    path = root / "runs/damaged/checkpoints/0000010/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert train_process(job) == 10
    assert "checkpoint 10 of the run damaged cannot be used; the run continues from an earlier one" in caplog.text
    assert [(file["name"], file["sha256"]) for file in job.run.checkpoint(10)["files"]] == [
        (file["name"], file["sha256"]) for file in whole["files"]]
    job.run.fetch(10)


@pytest.mark.slow
def test_validation_measures_the_use_of_neighbors_and_changes_nothing(root: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    config = _config(steps=24, lr=2e-3, validate_every=12)
    for name, validation in (("with", dataset), ("without", None)):
        assert train_in_processes(Job(Run.parse(str(root), name), dataset, dataset, config, validation=validation))
    validated_run, plain_run = (Run.parse(str(root), name) for name in ("with", "without"))
    assert validated_run.checkpoint(24)["content"] == plain_run.checkpoint(24)["content"]
    records = read_metrics(validated_run, "validation.jsonl")
    assert [record["step"] for record in records] == [12, 24] and read_metrics(plain_run, "validation.jsonl") == []
    for record in records:
        assert {"validation_loss", "validation_shuffled", "validation_nobody"} <= record.keys()
        grid = (root / f"runs/with/validation/{record['step']:07d}.png").read_bytes()
        assert Image.open(io.BytesIO(grid)).width > 300
    assert len({record["validation_loss"] for record in records}) == 2
    assert [line["step"] for line in read_metrics(validated_run)] == list(range(1, 25))
    assert main(["train", "with", "--dataset", "drawn", "--validation", "nowhere", "--root", str(root), "--config",
                     str(root / "settings.toml"), "--local", "--overwrite"]) == 2


def test_too_few_neighbors_are_refused_before_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    shutil.copytree(root / "datasets/drawn", root / "datasets/few")
    shutil.rmtree(root / "datasets/few/v1/neighbors")
    few = Dataset.parse(str(root), "few")
    run_stage(Neighbors(few, dataset, NeighborsConfig(k=3)))
    for name, validation in (("drawn", "few"), ("few", "")):
        validation_flags = ["--validation", validation] if validation else []
        command = ["train", "run", "--dataset", name, "--database", "drawn", *validation_flags, "--root", str(root),
                   "--config", str(root / "settings.toml")]
        assert main(command) == 2
        assert "few has 3 neighbors of each sample, the run takes 4" in capsys.readouterr().err
    assert not (root / "runs/run").exists()


def test_a_run_keeps_its_id_and_its_lineage(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    dataset = Dataset.parse(str(root), "drawn")
    job = Job(Run.parse(str(root), "tracked"), dataset, dataset, _config(steps=2))
    assert train_in_processes(job)
    first = json.loads((root / "runs/tracked/wandb.json").read_text())["id"]
    assert train_in_processes(replace(job, config=_config(steps=4)))
    folders = sorted(path.name for path in (root / "runs/tracked/wandb").glob("offline-run-*"))
    # wandb adds a number to the name of a second folder of the same second.
    assert len(folders) == 2 and all(f"-{first}" in name for name in folders)
    assert job.run.lineage()["neighbors"]["digest"] == dataset.identity("neighbors/drawn")["digest"]
    replace_plan(Training(job))
    assert train_in_processes(job)
    assert json.loads((root / "runs/tracked/wandb.json").read_text())["id"] != first


@pytest.mark.ray
@pytest.mark.slow
def test_training_continues_without_a_lost_node_and_takes_it_back(root: Path, cluster: Any,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    # The rate is low: the number of processes changes last bits, and many steps would enlarge the difference.
    flags = ["--global-batch", "64", "--lr", "1e-4"]
    run = Run.parse(str(root), "elastic")
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    process = subprocess.Popen([sys.executable, *_command(
        root, "elastic", *flags, "--workers", "3", "--min-workers", "1", "--cpus", "2", "--resize-every", "5",
        "--steps", "1000000")], stderr=subprocess.PIPE)
    try:
        _wait_for_step(root, "elastic", 8, process, seconds=240)
        assert _sizes(run) == [3] * len(_sizes(run))
        kept_step = run.latest_step()
        cluster.remove_node(node, allow_graceful=False)
        _wait_for_size(run, 2, process)
        # Training repeats the steps since the last checkpoint, and no step before it.
        assert kept_step <= _sizes(run).index(2) and _sizes(run).index(2) % 5 == 0
        node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        _wait_for_size(run, 3, process)
        kept_step = run.latest_step()
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
        cluster.remove_node(node)
    assert process.returncode == 130, log.decode()
    sizes = _sizes(run)
    assert sorted(set(sizes)) == [2, 3] and sizes[0] == sizes[-1] == 3
    last = len(sizes) - sizes[::-1].index(2)
    assert last <= kept_step and last % 5 == 0, "a node that came back is taken in from a checkpoint on"
    steps = str(run.latest_step() + 5)
    for name in ("elastic", "undisturbed"):
        assert main([*_command(root, name, *flags, "--steps", steps, "--local")[2:]]) == 0
    undisturbed_curve, elastic_curve = _curve(root, "undisturbed"), _curve(root, "elastic")
    assert [step for step, _ in elastic_curve] == list(range(1, int(steps) + 1))
    assert [loss for _, loss in elastic_curve] == pytest.approx([loss for _, loss in undisturbed_curve], rel=2e-3)


def _sizes(run: Run) -> list[int]:
    """The number of processes of each step."""
    return [line["world_size"] for line in read_metrics(run)]


def _wait_for_size(run: Run, size: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if _sizes(run)[-1:] == [size]:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run never had {size} processes: {_sizes(run)[-20:]}")


def test_a_run_is_not_emptied_while_another_command_trains_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "leased", "--dataset", "drawn", "--root", str(root), "--config", str(root / "settings.toml"),
               "--steps", "2", "--local"]
    assert main(command) == 0
    weights = synthetic.files_below(root / "runs/leased")
    with storage.hold_lease(str(root), "runs/leased"):
        assert main([*command, "--overwrite"]) == 1
        assert "another command works on " in capsys.readouterr().err
    assert synthetic.files_below(root / "runs/leased") == weights
    assert main([*command, "--overwrite"]) == 0


def test_two_commands_do_not_train_one_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.parse(str(root), "twice")
    command = _command(root, "twice", "--steps", "100000", "--local")
    first = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    while not list((root / "runs/twice").glob("metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.05)
    assert main(command[2:]) == 1
    assert f"another command works on {run.folder}: process {first.pid} on " in capsys.readouterr().err
    assert first.poll() is None
    first.kill()
    first.wait()
    step = str(len(_curve(root, "twice")) + 1)
    assert main([*_command(root, "twice", "--steps", step, "--local")[2:]]) == 0  # the killed one does not count


def test_validation_shows_no_hidden_row(root: Path, tmp_path: Path) -> None:
    """Neither as an image nor as a neighbor, though lists of neighbors are older; their vectors are zeros."""
    copy = Path(shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("runs")))
    dataset = Dataset.parse(str(copy), "drawn")
    job = Job(Run.parse(str(copy), "validated"), dataset, dataset, _config())
    before = Validation(job, dataset)
    hidden = {before.pictures[0].row, int(before.ids[before.shown[1], 0])}
    hide_rows(dataset, sorted(hidden), 0)
    after = Validation(job, dataset)
    assert hidden <= {row["row"] for row in before._shown_rows()}
    assert hidden.isdisjoint(row["row"] for row in after._shown_rows()) and len(after.pictures) == 8
    assert (after.ids == -1).any() and not after.context[torch.from_numpy(after.ids == -1)].any()
