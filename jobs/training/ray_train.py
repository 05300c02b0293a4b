"""The door to Ray Train: the processes of a run on a cluster."""

import contextlib
import threading
import time
import uuid
from typing import Any

import ray.train
from ray.experimental import internal_kv
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.cluster import connect
from jobs.cluster.config import ClusterConfig
from jobs.runs.labels import run_labels
from jobs.runs.metrics import read_metrics
from jobs.runs.run import HOPELESS
from jobs.telemetry import heartbeat, logs
from jobs.training.live_progress import TrainingView, read_run_progress
from jobs.training.train_stage import Job, Training
from jobs.training.worker import stop_on_signal, train_process
from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages.plan import prepare
from pipeline.stages.progress import period
from pipeline.stages.scratch import scratch_folder
from pipeline.stages.types import StageFailed

_LOOK_AGAIN_S = 1.0


def train_on_ray(job: Job, config: ClusterConfig) -> None:
    """Train on a Ray cluster, restarting after the loss of a worker, and show the progress.

    The checkpoints of the run are the only state. Ray's own state is discarded, so a second start never depends on it.
    """
    training = Training(job)
    connect.connect()
    connect.check_gpus_exist(training, config)
    prepare(training)
    job.run.mend()
    connect.mention_unused_gpus(training, config)
    launch = uuid.uuid4().hex
    with scratch_folder("ray-train") as scratch:
        # Every worker of every node needs to reach Ray's own folder; nothing of ours is kept in it.
        shared = storage.join(job.run.folder, "ray") if storage.is_local(job.run.folder) else str(scratch)
        trainer = _Trainer(
            _train_worker, train_loop_config={
                "job": job, "launch": launch, "log": logs.current_format(),
                "device": "cuda" if config.each_gpus else "cpu"},
            torch_config=TorchConfig(backend="nccl" if config.each_gpus else "gloo", timeout_s=600),
            scaling_config=_scaling(config),
            run_config=RunConfig(name=f"{job.run.name}-{uuid.uuid4().hex[:8]}", storage_path=shared,
                                 failure_config=_failures(config)),
        )
        done = threading.Event()
        thread = threading.Thread(target=_watch_progress, args=(job, done), daemon=True)
        thread.start()
        request = _StopRequest(launch)
        try:
            with heartbeat.doing("training on Ray"), stop_on_signal(request.ask):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            if known := _fatal_error(job, launch):
                raise known from error
            raise StageFailed(f"train: the run {job.run.name} failed {config.max_failures + 1} times: "
                                    f"{_first_line(error)}\nhint: run the same command again; it continues from the "
                                    f"newest checkpoint") from error
        finally:
            done.set()
            thread.join()
            if storage.is_local(shared):
                storage.remove_tree(shared)


class _StopRequest:
    """Asks the workers of a launch to stop, through two keys in the store of their Ray cluster."""

    def __init__(self, launch: str) -> None:
        self._begun, self._asked = f"rdm-begun-{launch}".encode(), f"rdm-stop-{launch}".encode()
        self._looked, self._is_asked = -float("inf"), False

    def ask(self) -> bool:
        """Ask, from the driver. False: the workers have not begun a step."""
        internal_kv._internal_kv_put(self._asked, b"1")
        return bool(internal_kv._internal_kv_exists(self._begun))

    def is_asked(self) -> bool:
        """Whether the driver wants a stop. A worker calls it at each step; it looks once a second."""
        if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            if self._looked < 0:
                internal_kv._internal_kv_put(self._begun, b"1")
            self._looked = time.monotonic()
            self._is_asked = bool(internal_kv._internal_kv_exists(self._asked))
        return self._is_asked


class _Trainer(TorchTrainer):
    """Ray's trainer without its own handler of Ctrl-C, which ends the process with 1 and discards the steps."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


# mypy sees the configuration classes of Ray's older Train API. ray.train replaces them when it is imported.

def _scaling(config: ClusterConfig) -> ScalingConfig:
    resources = {"CPU": config.cpus} | ({"GPU": config.each_gpus} if config.each_gpus else {})
    return ScalingConfig(  # type: ignore[call-arg]
        num_workers=_worker_count(config), use_gpu=config.each_gpus > 0,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=config.resize_every, resources_per_worker=resources)


def _failures(config: ClusterConfig) -> FailureConfig:
    return FailureConfig(  # type: ignore[call-arg]
        max_failures=config.max_failures, controller_failure_limit=config.max_failures)


def _worker_count(config: ClusterConfig) -> int | tuple[int, int]:
    """The number of processes. With a minimum, Ray Train starts with those that fit, and adds more later."""
    if 0 < config.min_workers < config.workers:
        return config.min_workers, config.workers
    return config.workers


def _train_worker(config: dict[str, Any]) -> None:
    logs.configure_logging(config["log"])
    devices.reserve(config["device"])
    job = config["job"]
    known = run_labels(job.dataset.name, job.dataset.version, job.run.name)
    # The first worker with an error that a retry cannot fix records it. Other workers do not try again.
    if fault := _fatal_error(job, config["launch"]):
        raise fault
    with logs.label_events(known), job.run.telling(config["launch"]):
        train_process(job, _StopRequest(config["launch"]).is_asked)


def _fatal_error(job: Job, launch: str) -> Exception | None:
    """The error that ended this launch for good, if one did."""
    fault = job.run.fault()
    return HOPELESS.get(fault["kind"], ValueError)(fault["message"]) if fault and fault["launch"] == launch else None


def _watch_progress(job: Job, done: threading.Event) -> None:
    """Show the progress and the records of the curve. Another process writes both, possibly on another node."""
    seen = _last_record(job)["step"]
    with contextlib.closing(TrainingView()) as view:
        while True:
            ended = done.wait(period(job.run.folder) / 2)
            if now := read_run_progress(job.run):
                view.show(now)
            if (record := _last_record(job))["step"] != seen:
                seen = record["step"]
                view.record(record, job.config.steps)
            if ended:
                return


def _last_record(job: Job) -> dict[str, Any]:
    lines = read_metrics(job.run)
    return lines[-1] if lines else {"step": 0}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    last = [line for line in text.splitlines() if line.strip()]
    return last[-1] if last else type(error).__name__
