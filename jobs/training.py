"""A training run wired to its data: what every process of it does, whoever started them."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from jobs import tracking
from jobs.runs import Run
from model.config import FREE_ON_RESUME, TrainConfig, to_dict
from model.train import train
from pipeline import embed, stage
from pipeline.batches import Batches
from pipeline.dataset import Dataset
from pipeline.images import pixels
from pipeline.lookup import samples
from pipeline.stage import Item, Output, Stage

KEEP_CHECKPOINTS = 3


@dataclass(frozen=True)
class Job:
    """What a process needs to know to take part in a run."""

    run: Run
    dataset: Dataset
    database: Dataset
    config: TrainConfig


class Training(Stage):
    """A run as a stage with one item: planned, sealed and verified like any other.

    What is special is between: the processes of the run work together, not item by item.
    """

    name = "train"

    def __init__(self, job: Job) -> None:
        super().__init__(job.run.root, job.run.path, job.config)
        self.job = job

    @property
    def command(self) -> str:
        return (f"python -m jobs train {self.job.run.name} --dataset {self.job.dataset.label} "
                f"--database {self.job.database.label} --root {self.root}")

    @property
    def elsewhere(self) -> str:
        return "give the run another name"

    def section(self) -> dict[str, Any]:
        first = samples(self.job.dataset, [0])[0]
        settings = super().section()
        # A finished run may be given more steps: how many is no part of what it is.
        return {"train": {key: value for key, value in settings.items() if key not in FREE_ON_RESUME},
                "dataset": self.job.dataset.label, "database": self.job.database.label,
                "encoder": embed.encoder_of(self.job.dataset), "image_size": int(pixels(first.picture).shape[0])}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.job.dataset.identity("shards"),
                "neighbors": self.job.dataset.identity(f"neighbors/{self.job.database.label}"),
                "database": self.job.database.identity("embeddings")}

    def plan(self) -> list[Item]:
        dim = embed.encoder_of(self.job.database)["dim"]
        if self.job.config.unet.context_dim != dim:
            raise ValueError(f"the network takes vectors of {self.job.config.unet.context_dim}, "
                             f"{self.job.database.label} has vectors of {dim}\nhint: --context-dim {dim}")
        return [Item("run")]

    def process(self, item: Item, scratch: Any) -> Output:
        """What the finished run left: the curve, and the checkpoint it ended with."""
        step = self.job.run.latest_step()
        assert step >= self.job.config.steps, (step, self.job.config.steps)
        lines = tracking.read(self.job.run)
        # Not the file of the curve: there are seconds in it, and an equal run has other ones.
        curve = stage.digest([[line["step"], line["loss"]] for line in lines])
        return Output(samples=step * self.job.config.global_batch,
                      info={"steps": step, "checkpoint": self.job.run.checkpoint(step)["content"], "curve": curve,
                            "loss": lines[-1]["loss"] if lines else None})

    def finish(self, records: list[dict[str, Any]], scratch: Any) -> Output:
        return Output(info=records[0]["info"])


def work(job: Job, stop: Callable[[], bool] | None = None) -> int:
    """This process's part of the run, from the newest complete checkpoint on; returns the step reached."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = _device()
    # Said aloud, for a stage that ran before in this process may have left another number: the last
    # bits of a loss depend on it.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    batches = Batches(job.dataset, job.database, k=job.config.k, global_batch=job.config.global_batch,
                      seed=job.config.seed, rank=rank, world=world)
    step = _agreed(max(job.run.steps(), default=0), device)
    metrics = tracker = None
    if rank == 0:
        metrics = tracking.Metrics(job.run, step)
        tracker = tracking.Tracker(job.run, to_dict(job.config))

    def save(reached: int, write: Callable[[Any], None]) -> None:
        with stage.scratch_folder("checkpoint") as scratch:
            write(scratch)
            metrics.flush()
            job.run.publish(reached, scratch)
        job.run.forget(KEEP_CHECKPOINTS)

    def log(record: dict[str, Any]) -> None:
        tracker.add(metrics.add(record | {"world_size": world}))

    try:
        return train(job.config, batches.at, device=device, save=save, log=log, stop=stop,
                     resume=job.run.fetch(step) if step else None)
    finally:
        if rank == 0:
            metrics.flush()
            tracker.close()


def in_processes(job: Job) -> bool:
    """Train in this process, or in those that torchrun started; whether this one speaks for all."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    stage_ = Training(job)
    if world == 1:
        stage.prepare(stage_)
        with _stoppable() as stop:
            work(job, stop)
        return True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        if dist.get_rank() == 0:
            stage.prepare(stage_)
        dist.barrier()
        with _stoppable() as stop:
            work(job, stop)
        return dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
