"""The work of each process of a training run, on Ray or under torchrun."""

import contextlib
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from jobs.runs.labels import run_labels
from jobs.runs.metrics import Metrics
from jobs.runs.run import Run
from jobs.telemetry import interrupts
from jobs.telemetry.trackers.subject import State
from jobs.telemetry.trackers.trackers import open_run_trackers
from jobs.training.live_progress import RunProgress, TrainingView
from jobs.training.train_stage import Job, Training
from jobs.training.validation import Validation
from model.network.unet import UNet
from model.training.precision import compute_dtype
from model.training.train import train
from pipeline import storage
from pipeline.batches.batches import Batches
from pipeline.hardware import devices
from pipeline.stages.plan import prepare
from pipeline.stages.scratch import scratch_folder

KEEP_CHECKPOINTS = 3
_log = logging.getLogger(__name__)


def train_process(job: Job, stop: Callable[[], bool] | None = None, view: TrainingView | None = None) -> int:
    """This process's part of the run, from the newest complete checkpoint on; returns the step reached.

    `view` shows the progress, in the process of rank 0.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = devices.choose_device()
    # Set explicitly: an earlier stage of this process may have left another number, and the last bits of a loss
    # depend on it.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    batches = Batches(job.dataset, job.database, k=job.config.k, global_batch=job.config.global_batch,
                      seed=job.config.seed, rank=rank, world=world, latents=job.latents,
                      own=job.config.own, size=job.config.image_size)
    if rank == 0 and (len(batches.forgotten) or len(batches.hidden_neighbors)):
        _log.warning("train: batches leave out %d forgotten images of %s, and %d neighbors in %s",
                     len(batches.forgotten), job.dataset.label, len(batches.hidden_neighbors), job.database.label)
    validate: Callable[[int, UNet], dict[str, Any]] | None = None
    if job.validation:
        validate = Validation(job, job.validation) if rank == 0 else _validate_on_rank_0
    step = _broadcast_step(_newest_complete_step(job.run) if rank == 0 else 0, device)
    dtype = devices.dtype_name(compute_dtype(job.config.precision, device))
    described = _describe_devices(devices.describe_device(dtype))
    resume = job.run.fetch(step) if step else None
    if rank != 0:
        return train(job.config, batches.at, device=device, save=_on_rank_0, log=_on_rank_0, stop=stop,
                     validate=validate, resume=resume)
    with contextlib.closing(_Recorder(job, step, {"world_size": world, "device": described}, view)) as recorder:
        reached = train(job.config, batches.at, device=device, save=recorder.save, log=recorder.log, stop=stop,
                        validate=validate, resume=resume, watch=recorder.watch)
        recorder.state = "finished" if reached >= job.config.steps else "stopped"
        return reached


def _on_rank_0(*_: Any) -> None:
    raise AssertionError("only rank 0 saves and logs")


def _validate_on_rank_0(step: int, network: UNet) -> dict[str, Any]:
    """Other ranks take part in nothing here, but must agree that the run validates."""
    return {}


class _Recorder:
    """Records a run on rank 0: checkpoints, metrics.jsonl, the trackers, Ray metrics, and the progress."""

    def __init__(self, job: Job, step: int, about: dict[str, Any], view: TrainingView | None) -> None:
        labels = run_labels(job.dataset.name, job.dataset.version, job.run.name)
        self.job, self.about = job, about
        self.metrics = Metrics(job.run, step)
        self.ray_metrics = _start_ray_metrics(labels, step, job)
        self.trackers = open_run_trackers(job, labels, step)
        self.state: State = "failed"
        self.view, self.step = view, step
        self.progress = RunProgress(job.run, job.config, view.show if view else None)

    def watch(self, step: int, loss: float) -> None:
        """Count a finished step."""
        self.step = step
        self.progress(step, loss)

    def save(self, step: int, write: Callable[[Any], None]) -> None:
        """Publish the checkpoint of a step, and remove old ones."""
        with scratch_folder("checkpoint") as scratch:
            write(scratch / "checkpoint")
            self.metrics.flush()
            self.job.run.publish(step, scratch / "checkpoint")
        self.trackers.saved()
        self.job.run.forget(KEEP_CHECKPOINTS)

    def log(self, record: dict[str, Any]) -> None:
        """Record the metrics of a step of training, or of a validation."""
        if "loss" not in record:
            images = {"validation": self.job.run.validated(record["step"])}
            self.trackers.add(self.metrics.note(record), images, hold=True)
            return
        record = self.metrics.add(record | self.about)
        self.trackers.add(record, hold=True)
        if self.view:
            self.view.record(record, self.job.config.steps)
        if self.ray_metrics:
            self.ray_metrics.add(record)

    def close(self) -> None:
        self.progress.close(self.step)
        self.metrics.flush()
        self.trackers.close(state=self.state)
        if self.ray_metrics:
            self.ray_metrics.close()


def _start_ray_metrics(known: dict[str, str], step: int, job: Job) -> Any:
    """Ray metrics of the loss curve, None outside of Ray."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return None
    from jobs.telemetry import ray_metrics
    return ray_metrics.Curve(known, step, job.config.steps, job.config.global_batch)


def train_in_processes(job: Job) -> bool:
    """Train in this process, or in those that torchrun started. True if this process has rank 0."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    training = Training(job)
    if world == 1:
        devices.choose_device()  # an unusable GPU must not leave a plan
        prepare(training)
        job.run.mend()
        with stop_on_signal() as stop, job.run.telling(), contextlib.closing(TrainingView()) as view:
            train_process(job, stop, view)
        return True
    device = devices.choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.get_rank() == 0:
            prepare(training)
            job.run.mend()
        dist.barrier()
        with stop_on_signal() as stop, job.run.telling(), contextlib.closing(TrainingView()) as view:
            train_process(job, stop, view)
        return dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _newest_complete_step(run: Run) -> int:
    """The step of the newest checkpoint whose files are as its manifest says, 0 without one.

    Later checkpoints are discarded, so that no process samples from one or takes the run for finished.
    """
    for step in reversed(run.steps()):
        try:
            run.fetch(step)
        except (ValueError, FileNotFoundError) as error:
            _log.warning("train: checkpoint %d of the run %s cannot be used; the run continues from an earlier one, or "
                         "starts again: %s", step, run.name, storage.first_line(error))
            run.discard(step)
        else:
            return step
    return 0


def _describe_devices(mine: str) -> str:
    """The devices of all processes, such as "8 x NVIDIA H100"."""
    if not dist.is_initialized():
        return mine
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return "; ".join(f"{count} x {name}" for name, count in Counter(every).most_common())


def _broadcast_step(step: int, device: torch.device) -> int:
    """The newest checkpoint of rank 0. Another rank may look later and see a newer one."""
    if not dist.is_initialized():
        return step
    shared = torch.tensor([step], device=device)
    dist.broadcast(shared, 0)
    return int(shared.item())


@contextlib.contextmanager
def stop_on_signal(ask: Callable[[], bool] | None = None) -> Iterator[Callable[[], bool]]:
    """A function that is true after SIGTERM, SIGHUP or Ctrl-C. The run then saves a checkpoint, and loses no steps.

    A second Ctrl-C ends the run without a checkpoint. `ask` tells other processes. If it returns False, there is no
    step to save, and the signal does what it did before.
    """
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGHUP:
            interrupts.leave_terminal()
        if ask and not ask():
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)
            return
        if before[signal.SIGINT] is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            _log.warning("train: the run saves a checkpoint and stops; Ctrl-C again stops without one")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a shell lets its background jobs ignore Ctrl-C, nohup SIGHUP
            signal.signal(number, stop)
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
