"""wandb gets all records, by the files that it writes offline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.runs.labels import run_labels
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.telemetry.trackers import trackers, wandb_tracker
from jobs.telemetry.trackers.subject import Subject
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from tests.jobs.telemetry.trackers import wandb_files
from tests.laws.terminal import HOSTILE, RAW, SHOWN

_SMALL = ('[train]\nsteps = 24\nglobal_batch = 4\nlog_every = 1\ncheckpoint_every = 6\nprecision = "fp32"\n'
          'image_size = 16\n[train.unet]\nmodel_channels = 32\n')


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    """A copy of the prepared root, with settings of a small run."""
    shutil.copytree(prepared_root, tmp_path / "root")
    (tmp_path / "root/settings.toml").write_text(_SMALL)
    return tmp_path / "root"


def _session(folder: Path, last: str = "group") -> dict[str, Any]:
    """The run, settings and history in a session's file. Waits for `last`, because another process writes the file."""
    end = time.monotonic() + 30
    while last not in (session := _read_session(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return session


def _read_session(folder: Path) -> dict[str, Any]:
    session: dict[str, Any] = {"history": [], "config": {}, "summary": {}}
    for record in wandb_files.records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            session |= {"id": record.run.run_id, "group": record.run.run_group, "job": record.run.job_type,
                        "name": record.run.display_name, "project": record.run.project}
            session["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            session["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "exit":
            session["exit"] = record.exit.exit_code
        elif kind == "history":
            session["history"].append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                                       for item in record.history.item})
        elif kind == "summary":
            session["summary"] |= {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                                   for item in record.summary.update}
    return session


def _sessions(folder: Path, place: str = "wandb") -> list[dict[str, Any]]:
    """The sessions in a folder, in the order in which `wandb sync` takes them."""
    return [_session(session_folder) for session_folder in sorted((folder / place).glob("offline-run-*"))]


def _unfinished(folder: Path) -> list[dict[str, Any]]:
    """The sessions of killed processes, which `wandb sync` does not take."""
    return _sessions(folder, "wandb-unfinished")


def _steps(sessions: list[dict[str, Any]]) -> list[list[int]]:
    return [[line["_step"] for line in session["history"]] for session in sessions]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}


def _command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs", *arguments, "--root", str(root), "--local"]


def _train(root: Path, *arguments: str) -> list[str]:
    return _command(root, "train", "small", "--dataset", "drawn", "--config", str(root / "settings.toml"), *arguments)


_FOLLOWED = """
import os, sys, time
from jobs.runs.labels import run_labels
from jobs.runs.metrics import Metrics
from jobs.telemetry.trackers import trackers
from jobs.runs.run import Run
from jobs.training.train_stage import Job
from model.recipes import tiny
from pipeline.datasets.dataset import Dataset
root, first, last, ends, *validates = sys.argv[1], *map(int, sys.argv[2:])
dataset = Dataset.parse(root, "drawn")
job = Job(Run.parse(root, "small"), dataset, dataset, tiny())
metrics = Metrics(job.run, first)
tracker = trackers.open_run_trackers(job, run_labels("drawn", "v1", "small"), first)
for step in range(first + 1, last + 1):
    tracker.add(metrics.add({"step": step, "loss": 1 / step, "seconds": 0.1}), hold=True)
    if validates and step % 6 == 0:
        tracker.add(metrics.note({"step": step, "validation_loss": float(step)}),
                    {"validation": job.run.validated(step)}, hold=True)
    if step % 6 == 0:
        metrics.flush()
        tracker.saved()
print("here", flush=True)
if not ends:
    time.sleep(100)
while "WAITS_FOR" in os.environ and not os.path.exists(os.environ["WAITS_FOR"]):
    time.sleep(0.1)
tracker.saved()
tracker.close()
"""


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a session of a run: its first step but one, its last step, whether it ends by itself, its validations."""
    started: list[subprocess.Popen[str]] = []

    def start(*numbers: int, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen([sys.executable, "-c", _FOLLOWED, str(tmp_path), *map(str, numbers)], text=True,
                                   env=_environment() | environment, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "here\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _kill(process: "subprocess.Popen[str]", after: float = 0.0) -> None:
    time.sleep(after)
    process.kill()
    process.wait()
    time.sleep(1.1)  # the folders are named by the second


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, pytest.param(4.0, marks=pytest.mark.slow)])  # before wandb writes, and after
def test_the_next_session_logs_the_steps_of_a_killed_one_once(tmp_path: Path, session: Any, seconds: float) -> None:
    run = tmp_path / "runs/small"
    _kill(session(0, 15, 0), seconds)
    assert session(12, 20, 1).wait(60) == 0
    assert _steps(_sessions(run)) == [list(range(1, 21))]
    # wandb keeps the newest step open until there is another.
    assert _steps(_unfinished(run)) == [list(range(1, 12)) if seconds else []]


@pytest.mark.slow
def test_finished_sessions_stay_and_killed_ones_are_set_aside(tmp_path: Path, session: Any) -> None:
    run = tmp_path / "runs/small"
    assert session(0, 12, 1).wait(60) == 0
    time.sleep(1.1)
    _kill(session(12, 22, 0), 3.0)
    _kill(session(18, 26, 0))
    assert session(24, 30, 1).wait(60) == 0
    time.sleep(1.1)
    assert session(30, 33, 1).wait(60) == 0
    assert _steps(_sessions(run)) == [list(range(1, 13)), list(range(13, 31)), list(range(31, 34))]
    assert _steps(_unfinished(run)) == [list(range(13, 18)), []]
    losses = [line["loss"] for finished in _sessions(run) for line in finished["history"]]
    assert losses == [line["loss"] for line in read_metrics(Run.parse(str(tmp_path), "small"))] == [
        1 / step for step in range(1, 34)]


def test_the_next_session_logs_the_validations_of_a_killed_one(tmp_path: Path, session: Any) -> None:
    run = tmp_path / "runs/small"
    (run / "validation").mkdir(parents=True)
    for step in (6, 12):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / f"validation/{step:07d}.png")
    _kill(session(0, 15, 0, 1))
    assert session(12, 14, 1).wait(60) == 0
    merged_session, = _sessions(run)
    assert [(line["_step"], line["validation_loss"], line["validation/_type"]) for line in merged_session["history"]
            if "validation_loss" in line] == [(6, 6.0, "image-file"), (12, 12.0, "image-file")]
    assert _steps([merged_session]) == [list(range(1, 15))]
    folder, = (run / "wandb").glob("offline-run-*")
    assert len(list((folder / "files/media/images").glob("validation_*.png"))) == 2


@pytest.mark.slow
def test_steps_repeated_after_a_damaged_checkpoint_are_logged_once(tmp_path: Path, session: Any) -> None:
    assert session(0, 12, 1).wait(60) == 0
    time.sleep(1.1)
    assert session(6, 20, 1).wait(60) == 0
    assert _steps(_sessions(tmp_path / "runs/small")) == [list(range(1, 13)), list(range(13, 21))]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_of_an_earlier_version_is_one_curve(tmp_path: Path, session: Any, killed: bool) -> None:
    run = tmp_path / "runs/small"
    first = session(0, 12, int(not killed))
    _kill(first, 3.0) if killed else first.wait(60)
    run_id = storage.read_json(str(run / "wandb.json"))["id"]
    storage.put_json({"id": run_id}, str(run / "wandb.json"))  # as earlier versions wrote it
    time.sleep(1.1)
    assert session(12, 20, 1).wait(60) == 0
    assert _steps(_sessions(run)) == [list(range(1, 21))] and _sessions(run)[0]["id"] == run_id
    # Nothing is deleted: what is not in the curve any more is beside it.
    assert _steps(_unfinished(run)) == [list(range(1, 12 if killed else 13))]


def test_an_online_session_ignores_offline_ones_and_logs_nothing_again(tmp_path: Path, monkeypatch) -> None:
    run = Run.parse(str(tmp_path), "small")
    folder = tmp_path / "runs/small/wandb/offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    storage.put_json({"id": "abc"}, str(tmp_path / "runs/small/wandb.json"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://no-such-host.invalid")
    monkeypatch.setattr("wandb.init", lambda **_: object())  # logging to it would raise, and end the session
    tracker = wandb_tracker.WandbTracker(Subject(str(tmp_path), run.folder, run_labels("drawn", "v1", "small"), {}, {},
                                                 training=True))
    tracker.replay([({"step": 1, "loss": 1.0}, {})])
    assert tracker.session is not None and folder.exists()
    wandb_tracker._set_aside(run.folder, tmp_path / "runs/small")
    assert not folder.exists() and (tmp_path / "runs/small/wandb-unfinished" / folder.name).exists()


@pytest.mark.slow
def test_a_session_that_was_set_aside_does_not_count_as_finished(tmp_path: Path, session: Any) -> None:
    run = tmp_path / "runs/small"
    # It lost its driver, and does not know of it.
    replaced_session = session(0, 12, 1, WAITS_FOR=str(tmp_path / "next"))
    time.sleep(1.1)
    assert session(12, 15, 1).wait(60) == 0
    (tmp_path / "next").touch()
    assert replaced_session.wait(60) == 0
    status = storage.read_json(str(run / "wandb.json"))
    assert status["last_step"] == 15 and len(status["finished"]) == 1
    assert _steps(_sessions(run)) == [list(range(1, 16))] and len(_unfinished(run)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lines", [15, 400])
def test_a_killed_and_resumed_run_is_one_curve_offline(root: Path, lines: int) -> None:
    process = subprocess.Popen(_train(root, "--steps", "5000"), env=_environment(), stderr=subprocess.DEVNULL)
    curve = root / "runs/small/metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (curve.exists() and len(curve.read_text().splitlines()) >= lines):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = Run.parse(str(root), "small").latest_step()
    steps = reached + 8
    time.sleep(1.1)  # the folders are named by the second
    killed_history = _sessions(root / "runs/small")[0]["history"]
    resume = subprocess.run(_train(root, "--steps", str(steps)), env=_environment(), capture_output=True, text=True)
    assert resume.returncode == 0, resume.stderr
    (first,), (second,) = _unfinished(root / "runs/small"), _sessions(root / "runs/small")
    assert first["history"] == killed_history
    assert second["id"] == storage.read_json(str(root / "runs/small/wandb.json"))["id"]
    loss_by_step = {line["step"]: line["loss"] for line in read_metrics(Run.parse(str(root), "small"))}
    tracked_losses = [(line["_step"], line["loss"]) for line in second["history"]]
    # Nothing twice, nothing missing, and nothing from steps that the killed process had not saved.
    assert tracked_losses == sorted(loss_by_step.items())
    assert [step for step, _ in tracked_losses] == list(range(1, steps + 1))
    assert reached > 0 and reached % 6 == 0 and all(line["_step"] <= reached for line in killed_history)
    assert all(field == second[key] for key, field in first.items() if key in ("id", "group", "job"))
    dataset = Dataset.parse(str(root), "drawn")
    config = second["config"]
    assert (second["group"], second["job"], second["name"]) == ("drawn@v1", "train", "small")
    assert config["lineage"]["shards"]["digest"] == dataset.manifest("shards")["content"]
    assert config["lineage"]["neighbors"]["digest"] == dataset.manifest("neighbors/drawn")["content"]
    assert (config["dataset"], config["version"], config["database"]) == ("drawn", "v1", "drawn")
    assert config["code"] and config["global_batch"] == 4


def test_stages_are_jobs_of_one_group_and_no_tracker_is_used_by_default(root: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for arguments in ([], ["--tracker", "wandb"]):
        shutil.rmtree(root / "datasets/drawn/v1/index")
        assert not (root / "datasets/drawn/v1/wandb").exists()
        assert main(["index", "drawn", "--root", str(root), "--local", *arguments]) == 0
    folder, = (root / "datasets/drawn/v1/wandb").glob("offline-run-*")
    tracked = _session(folder, "exit")  # wandb's process writes it last
    manifest = Dataset.parse(str(root), "drawn").manifest("index")
    assert (tracked["group"], tracked["job"]) == ("drawn@v1", "index")
    assert (tracked["name"], tracked["project"]) == ("drawn@v1 index", "rdm")
    assert tracked["history"][-1]["_step"] == 1 and tracked["history"][-1]["samples"] == manifest["totals"]["samples"]
    assert tracked["summary"]["content"] == manifest["content"]
    assert tracked["config"]["lineage"]["embeddings"]["digest"] == Dataset.parse(str(root), "drawn").manifest(
        "embeddings")["content"]
    assert tracked["config"]["bytes_per_vector"] == manifest["section"]["bytes_per_vector"]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def test_text_of_others_has_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "datasets" / "drawn" / "v1"
    folder.mkdir(parents=True)
    tracker = wandb_tracker.WandbTracker(Subject(str(tmp_path), str(folder), run_labels("drawn", "v1", HOSTILE),
                                                 {"prompts": [HOSTILE]}, {"shards": {"path": HOSTILE, "digest": "0"}}))
    tracker.add({"step": 1, f"left_out/{HOSTILE}": 3})
    tracker.close({"info": {"caption": HOSTILE}})
    (session,) = [_session(session_folder, "exit") for session_folder in tmp_path.rglob("offline-run-*")]
    assert session["config"]["prompts"] == [SHOWN] and session["config"]["lineage"]["shards"]["path"] == SHOWN
    assert session["name"] == SHOWN and any(f"left_out/{SHOWN}" in line for line in session["history"])
    assert not any(map(RAW.search, _texts(session)))


def test_no_file_has_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["jobs", "rebuild", "drawn", "--sign", "/keys/private.pem"])
    tracker = wandb_tracker.WandbTracker(Subject(str(tmp_path), str(tmp_path), run_labels("drawn", "v1", "x"), {}, {}))
    tracker.close()
    assert [_session(folder, "exit")["exit"] for folder in tmp_path.rglob("offline-run-*")] == [0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"private.pem" in path.read_bytes()]


@pytest.mark.slow
def test_none_means_no_tracker(root: Path) -> None:
    subprocess.run(_train(root, "--steps", "2", "--tracker", "none"), env=_environment(), check=True,
                   capture_output=True)
    assert not (root / "runs/small/wandb").exists() and not (root / "runs/small/wandb.json").exists()
    assert len(read_metrics(Run.parse(str(root), "small"))) == 2


@pytest.mark.parametrize(("choices", "by_default", "mode", "names"), [
    (["wandb"], False, "", ["wandb"]), (["auto"], True, "", ["wandb"]), ([], True, "", ["wandb"]), ([], False, "", []),
    (["none"], True, "", []), (["wandb", "mlflow"], True, "disabled", ["mlflow"]), (["mlflow"], True, "", ["mlflow"]),
    (["tensorboard", "auto"], True, "", ["wandb", "tensorboard"])])
def test_a_command_has_the_configured_trackers(choices: list[str], by_default: bool, mode: str, names: list[str],
                                               monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert trackers.chosen(choices, by_default=by_default) == names


def test_inputs_become_artifacts_by_content() -> None:
    inputs = {"shards": {"path": "datasets/a/v1/shards", "digest": "1" * 64},
              "neighbors": {"path": "datasets/a/v1/neighbors/b@v2", "digest": "2" * 64}}
    shards, neighbors = wandb_tracker.make_artifacts(inputs)
    other_inputs = inputs | {"shards": {"path": "datasets/a/v1/shards", "digest": "3" * 64}}
    other_shards = wandb_tracker.make_artifacts(other_inputs)[0]
    assert (shards.name, shards.type, shards.metadata["content"]) == ("datasets-a-v1-shards", "shards", "1" * 64)
    assert neighbors.name == "datasets-a-v1-neighbors-b-v2"
    assert shards.digest != other_shards.digest and shards.digest == wandb_tracker.make_artifacts(inputs)[0].digest


@pytest.mark.slow
def test_a_failed_tracker_does_not_stop_the_run(root: Path) -> None:
    (root / "runs/small").mkdir(parents=True)
    (root / "runs/small/wandb").write_text("no folder can be made here")
    done = subprocess.run(_train(root, "--steps", "2"), env=_environment() | {"WANDB_DIR": "/proc/none"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
