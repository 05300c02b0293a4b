"""TensorBoard and MLflow get all records. Their own readers read their own files."""

import importlib.util
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.runs.labels import run_labels
from jobs.runs.run import Run
from jobs.telemetry.trackers import background, trackers
from jobs.telemetry.trackers.mlflow_tracker import MlflowTracker
from jobs.telemetry.trackers.subject import Subject
from jobs.training.train_stage import Job
from jobs.training.worker import train_in_processes
from model.recipes import tiny
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_stage
from pipeline.stages.types import Output
from tests.jobs.telemetry.trackers.test_wandb_tracker import _FOLLOWED
from tests.laws.terminal import HOSTILE, RAW
from tests.pipeline.stages.count_stage import Count

PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
NAMES = [pytest.param(name, marks=pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in packages), reason=f"pip install {packages[0]}"))
    for name, packages in PACKAGES.items()]


# A tracker that a busy machine slows must not lose records at the end of a test.
_PATIENT = "from jobs.telemetry.trackers import background\nbackground._CLOSE_SECONDS = 500.0\n"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_CLOSE_SECONDS", 500.0)


@dataclass
class Tracked:
    """The content of a run, by its reader."""

    state: str
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """For each name: the step and the width of each image."""
    settings: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def read_tensorboard(root: Path, path: str) -> Tracked:
    """The content of the event files of a folder, by the reader of TensorBoard."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    place, _, rest = path.partition("/samples")
    folder = root / place / "tensorboard" / f"samples{rest}" if rest else root / place / "tensorboard"
    events = accumulators.EventAccumulator(str(folder), size_guidance={
        accumulators.SCALARS: 0, accumulators.IMAGES: 0, accumulators.TENSORS: 0})
    events.Reload()
    tags = events.Tags()
    texts = {tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
             for tag in tags["tensors"]}
    return Tracked(texts["state"], {tag: [(event.step, event.value) for event in events.Scalars(tag)]
                                    for tag in tags["scalars"]},
                   {tag: [(event.step, event.width) for event in events.Images(tag)] for tag in tags["images"]},
                   json.loads(texts["settings"]), list(texts.values()))


def read_mlflow(root: Path, path: str) -> Tracked:
    """The content of the local store, by the client of MLflow."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    run = client.get_run(json.loads((root / path / "mlflow.json").read_text())["id"])
    metrics = {key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
               for key in run.data.metrics}
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    images: dict[str, list[tuple[int, int]]] = {}
    for file in sorted((folder / "images").glob("*.png")):
        name, _, step = file.name.partition("+step+")
        images.setdefault(name, []).append((int(step.split("+")[0]), Image.open(file).width))
    texts = [json.dumps(run.to_dictionary()), *(file.read_text() for file in folder.glob("*.json"))]
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    return Tracked(run.info.status, metrics, {name: sorted(shown) for name, shown in images.items()}, settings, texts)


READERS: dict[str, Callable[[Path, str], Tracked]] = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}
STATES = {"tensorboard": {"finished": "finished", "failed": "failed"},
          "mlflow": {"finished": "FINISHED", "failed": "FAILED"}}


class _Grid(Count):
    """A stage of six items that makes an image, as sampling does."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.path = "runs/small/samples/grid"
        self.folder = storage.join(self.root, self.path)

    def finish(self, records: Any, scratch: Path) -> Output:
        Image.new("RGB", (24, 8)).save(scratch / "grid.png")
        return Output(files={"grid.png": scratch / "grid.png"})


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker whose packages are installed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return request.param


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Both trackers, which one session reports to."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for packages in PACKAGES.values():
        for package in packages:
            pytest.importorskip(package)
    return tuple(PACKAGES)


def _session(root: Path, names: tuple[str, ...], *numbers: int, kill: bool = False, **environment: str) -> None:
    """A session of a run as in test_wandb_tracker: its first step but one, its last step, whether it ends itself."""
    code = _PATIENT + _FOLLOWED.replace("tiny())", f"tiny(), trackers={names!r})")
    process = subprocess.Popen([sys.executable, "-c", code, str(root), *map(str, numbers)], text=True,
                               env=os.environ | environment, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "here\n"
    if kill:
        time.sleep(float(environment.get("LIVES", 0)))
        process.kill()
    assert process.wait() == (-9 if kill else 0)


@pytest.mark.parametrize("seconds", ["0", pytest.param("6", marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_is_one_run_with_each_step_once(tmp_path: Path, both: tuple[str, ...],
                                                                 seconds: str) -> None:
    run = tmp_path / "runs/small"
    (run / "validation").mkdir(parents=True)
    for step in (6, 12, 18):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / f"validation/{step:07d}.png")
    _session(tmp_path, both, 0, 15, 0, 1, kill=True, LIVES=seconds)
    _session(tmp_path, both, 12, 20, 1, 1)
    _session(tmp_path, both, 20, 22, 1)
    for name in both:
        tracked = READERS[name](tmp_path, "runs/small")
        assert tracked.state == STATES[name]["finished"]
        assert [step for step, _ in tracked.metrics["loss"]] == list(range(1, 23))
        assert all(math.isclose(loss, 1 / step, rel_tol=1e-6) for step, loss in tracked.metrics["loss"])
        assert tracked.metrics["validation_loss"] == [(6, 6.0), (12, 12.0), (18, 18.0)]
        assert tracked.images == {"validation": [(6, 8), (12, 8), (18, 8)]}
        assert tracked.settings["database"] == "drawn" and tracked.settings["unet"]["model_channels"] > 0


def test_training_reports_its_end_and_a_failure(prepared_root: Path, tmp_path: Path, both: tuple[str, ...],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    root, small = tmp_path / "root", tiny()
    shutil.copytree(prepared_root, root)
    dataset = Dataset.parse(str(root), "drawn")
    config = replace(small, steps=5, global_batch=2, log_every=2, checkpoint_every=2, image_size=16, precision="fp32",
                     unet=replace(small.unet, model_channels=32, channel_mult=(1,), attention_downsampling=(1,)))
    job = Job(Run.parse(str(root), "small"), dataset, dataset, config, trackers=both)

    def fail(*_: Any) -> None:
        raise FloatingPointError("no number")

    with monkeypatch.context() as patched, pytest.raises(FloatingPointError):
        patched.setattr(Run, "publish", fail)
        train_in_processes(job)
    assert [READERS[name](root, job.run.path).state for name in both] == [STATES[name]["failed"] for name in both]
    assert train_in_processes(job)
    for name in both:
        tracked = READERS[name](root, job.run.path)
        assert tracked.state == STATES[name]["finished"]
        assert [step for step, _ in tracked.metrics["loss"]] == [2, 4, 5]  # the last one always


def test_a_stage_reports_its_counts_and_its_images(tmp_path: Path, name: str) -> None:
    stage = _Grid(tmp_path)
    with trackers.track_stage(stage, run_labels("", "", "small"), (name,)) as tracked:
        tracked.sealed(run_stage(stage, watch=tracked.watch))
    read = READERS[name](tmp_path, stage.path)
    assert read.state == STATES[name]["finished"] and read.metrics["items"][-1] == (6, 6.0)
    assert read.images == {"grid": [(6, 24)]} and read.settings == stage.section()


def test_text_of_others_has_no_control_characters(tmp_path: Path, name: str) -> None:
    subject = Subject(str(tmp_path), str(tmp_path / "runs/small"), run_labels("drawn", "v1", "small"),
                      {"prompts": [HOSTILE], HOSTILE: 1}, {"shards": {"path": HOSTILE, "digest": "0"}}, training=True)
    tracker = trackers.Trackers(subject, [name])
    tracker.add({"step": 1, f"left_out/{HOSTILE}": 3})
    tracker.close({"caption": HOSTILE})
    read = READERS[name](tmp_path, "runs/small")
    assert [values for key, values in read.metrics.items() if key.startswith("left_out/")] == [[(1, 3.0)]]
    assert read.state == STATES[name]["finished"]
    assert not any(RAW.search(text) for text in read.texts if "\n" not in text)


def test_a_server_that_is_gone_is_named_once_and_its_records_come_later(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://me:hidden@127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    subject = Subject(str(tmp_path), str(tmp_path / "runs/small"), run_labels("drawn", "v1", "small"), {}, {},
                      training=True)
    steps_are_done, order = threading.Event(), []

    class SlowTracker(MlflowTracker):
        def open(self) -> None:
            steps_are_done.wait(60)
            order.append("server")
            super().open()

    tracker = SlowTracker(subject)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 8):
            tracker.add({"step": step, "loss": 1.0})
            tracker.saved()
        order.append("steps")
        steps_are_done.set()
        tracker.close()
    assert order[:2] == ["steps", "server"], "a step waited for the server"
    lines = [record.getMessage() for record in caplog.records if record.name == background.__name__]
    assert len(lines) == 2 and "does not take records of small" in lines[0]
    assert "7 records of small were not tracked" in lines[1] and "hidden" not in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the server is back
    tracker = MlflowTracker(subject)
    tracker.replay([({"step": step, "loss": 1.0}, {}) for step in range(1, 8)])
    tracker.close()
    assert [step for step, _ in read_mlflow(tmp_path, "runs/small").metrics["loss"]] == list(range(1, 8))


def test_records_wait_while_a_tracker_fails(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    subject = Subject(str(tmp_path), str(tmp_path / "runs/small"), run_labels("drawn", "v1", "small"), {}, {},
                      training=True, first_step=1)
    place = tmp_path / ("runs/small/tensorboard" if name == "tensorboard" else "mlflow")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("no folder can be made here")
    tracker = trackers._TRACKERS[name](subject)
    for step in range(1, 4):
        tracker.add({"step": step, "loss": float(step)})
    tracker._thread.submit(int).result()  # all before it has been tried
    place.unlink()
    tracker.saved()
    tracker.close()
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == [background.__name__]
    assert READERS[name](tmp_path, "runs/small").metrics["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("package", ["mlflow", pytest.param("sqlalchemy", marks=pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="pip install mlflow-skinny"))])
def test_a_missing_package_is_named_before_any_work(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "datasets/drawn").mkdir(parents=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    for arguments in (["embed", "drawn"], ["train", "small", "--dataset", "drawn"]):
        assert main([*arguments, "--root", str(tmp_path), "--local", "--tracker", "mlflow"]) == 2
        error = capsys.readouterr().err
        assert f"needs the package {package}" in error and "hint: pip install mlflow-skinny" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["datasets", "drawn"]


def test_none_together_with_another_tracker_is_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "datasets/drawn").mkdir(parents=True)
    assert main(["embed", "drawn", "--root", str(tmp_path), "--local", "--tracker", "none", "--tracker", "wandb"]) == 2
    assert "--tracker none was given with --tracker wandb" in capsys.readouterr().err
