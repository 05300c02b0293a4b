"""What every process of a training run does, whoever started them."""

import contextlib
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from jobs.runs.labels import run_labels
from jobs.runs.metrics import Metrics
from jobs.runs.run import Run
from jobs.telemetry import wandb_tracker
from jobs.training.train_stage import Job, Training
from jobs.training.validation import Validation
from model.training.precision import compute_dtype
from model.training.train import train
from pipeline.batches.batches import Batches
from pipeline.hardware import devices
from pipeline.stages.plan import prepare
from pipeline.stages.scratch import scratch_folder

KEEP_CHECKPOINTS = 3
_log = logging.getLogger(__name__)


def train_process(job: Job, stop: Callable[[], bool] | None = None) -> int:
    """This process's part of the run, from the newest complete checkpoint on; returns the step reached."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = devices.choose_device()
    # Said aloud, for a stage that ran before in this process may have left another number: the last
    # bits of a loss depend on it.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    batches = Batches(job.dataset, job.database, k=job.config.k, global_batch=job.config.global_batch,
                      seed=job.config.seed, rank=rank, world=world, latents=job.latents,
                      own=job.config.own, size=job.config.image_size)
    validate = None
    if job.validation:
        validate = Validation(job, job.validation) if rank == 0 else lambda *_: {}
    step = _agreed(_whole(job.run) if rank == 0 else 0, device)
    where = _devices(devices.describe_device(devices.dtype_name(compute_dtype(job.config.precision, device))))
    metrics = tracker = curve = None
    if rank == 0:
        known = run_labels(job.dataset.name, job.dataset.version, job.run.name)
        metrics = Metrics(job.run, step)
        curve = _curve(known, step, job)
        tracker = wandb_tracker.start_run_tracker(job, known)

    def save(reached: int, write: Callable[[Any], None]) -> None:
        with scratch_folder("checkpoint") as scratch:
            write(scratch / "checkpoint")
            metrics.flush()
            job.run.publish(reached, scratch / "checkpoint")
        tracker.saved()
        job.run.forget(KEEP_CHECKPOINTS)

    def log(record: dict[str, Any]) -> None:
        if "loss" in record:
            record = metrics.add(record | {"world_size": world, "device": where})
            tracker.add(record, hold=True)
            if curve:
                curve.add(record)
        else:
            tracker.add(metrics.note(record), picture=job.run.validated(record["step"]), hold=True)

    try:
        return train(job.config, batches.at, device=device, save=save, log=log, stop=stop, validate=validate,
                     resume=job.run.fetch(step) if step else None)
    finally:
        if rank == 0:
            metrics.flush()
            tracker.close()
            if curve:
                curve.close()


def _curve(known: dict[str, str], step: int, job: Job) -> Any:
    """What tells Ray of the curve, in a process of Ray's."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return None
    from jobs.telemetry import ray_metrics
    return ray_metrics.Curve(known, step, job.config.steps, job.config.global_batch)


def train_in_processes(job: Job) -> bool:
    """Train in this process, or in those that torchrun started; whether this one speaks for all."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    stage_ = Training(job)
    if world == 1:
        devices.choose_device()  # an unusable GPU must not leave a plan
        prepare(stage_)
        job.run.mend()
        with _stoppable() as stop, job.run.telling():
            train_process(job, stop)
        return True
    device = devices.choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.get_rank() == 0:
            prepare(stage_)
            job.run.mend()
        dist.barrier()
        with _stoppable() as stop, job.run.telling():
            train_process(job, stop)
        return dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _whole(run: Run) -> int:
    """The step of the newest checkpoint whose files are as its manifest says, 0 without one.

    Those after it are no checkpoints any more: nobody shall draw with one, or take the run for finished.
    """
    for step in reversed(run.steps()):
        try:
            run.fetch(step)
        except (ValueError, FileNotFoundError) as error:
            _log.warning("train: checkpoint %d of the run %s cannot be used, the one before is taken, or the run "
                         "begins anew: %s", step, run.name, str(error).splitlines()[0])
            run.discard(step)
        else:
            return step
    return 0


def _devices(mine: str) -> str:
    """The devices of all processes, such as "8 x NVIDIA H100"."""
    if not dist.is_initialized():
        return mine
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return "; ".join(f"{count} x {name}" for name, count in Counter(every).most_common())


def _agreed(step: int, device: torch.device) -> int:
    """Rank 0's newest checkpoint: another rank may look a moment later and see a newer one."""
    if not dist.is_initialized():
        return step
    shared = torch.tensor([step], device=device)
    dist.broadcast(shared, 0)
    return int(shared.item())


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM came: the run then saves and ends instead of losing steps."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
