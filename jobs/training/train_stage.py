"""A training run as a stage, and the job that its processes receive."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.runs.metrics import never_made_a_step, read_metrics
from jobs.runs.run import Run
from model.config import TrainConfig, identity
from pipeline import storage
from pipeline.batches.batches import OWN
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.lookup import samples
from pipeline.embeddings.embed import dataset_encoder
from pipeline.media.resize import decode_pixels
from pipeline.stages.plan import read_claim
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Item, Output, StageFailed

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The job of each process of a run."""

    run: Run
    dataset: Dataset
    database: Dataset
    config: TrainConfig
    latents: bool = False
    """Whether it trains on the latents of the dataset instead of its images."""
    validation: Dataset | None = None
    """The dataset of validation. It does not change the run, so it is not part of its fingerprint."""
    trackers: tuple[str, ...] = ()
    """The names of trackers. Without any it is wandb. They are not part of the fingerprint either."""


@contextlib.contextmanager
def hold_training(run: Run) -> Iterator[None]:
    """Be the only command that trains a run. StageFailed if another one does.

    A command on another machine may have been killed. So this waits until its lease would have ended.
    """
    lease = storage.Lease(run.root, f"training/{run.name}", exclusive=True)  # outside of the run: others read it
    patience = time.monotonic() + storage.EXPIRE_S + storage.RENEW_S
    waits = False
    while True:
        try:
            lease.acquire()
            break
        except storage.LeaseConflict as error:
            if error.holder.is_on_this_machine or time.monotonic() > patience:
                raise StageFailed(f"another command works on {run.folder}: {error.holder}\n"
                                  f"hint: wait until it has ended, or stop it") from None
            if not waits:
                _log.info("train: %s holds the run %s; waiting until it ends or its lease does", error.holder, run.name)
            waits = True
    try:
        yield
    finally:
        lease.release()


class Training(Stage):
    """A run as a stage with one item: planned, sealed and verified like any other.

    The processes of the run work together in between, not item by item.
    """

    name = "train"
    workers_need_gpu = True
    shares_gpus = False

    def __init__(self, job: Job) -> None:
        super().__init__(job.run.root, job.run.path, job.config)
        self.job = job

    @property
    def command(self) -> str:
        return (f"python -m jobs train {self.job.run.name} --dataset {self.job.dataset.name_in_commands} "
                f"--database {self.job.database.name_in_commands} --root {storage.quote(self.root)}")

    @property
    def alternative(self) -> str:
        return "repeat the settings of the run, or give it another name"

    def section(self) -> dict[str, Any]:
        size = self.job.config.image_size or int(decode_pixels(samples(self.job.dataset, [0])[0].picture).shape[0])
        latents = ({"first_stage": self.job.dataset.manifest("latents")["info"]["first_stage"]} if self.job.latents
                   else {})
        # A finished run may continue with more steps, so their number is not part of the fingerprint.
        return {"train": identity(self.job.config), **latents,
                "dataset": self.job.dataset.label, "database": self.job.database.label,
                "encoder": dataset_encoder(self.job.dataset), "image_size": size}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"shards": self.job.dataset.identity("shards"),
                "neighbors": self.job.dataset.identity(f"neighbors/{self.job.database.label}"),
                "database": self.job.database.identity("embeddings"),
                **{name: self.job.dataset.identity(stage_name) for name, stage_name in self._optional_stages().items()}}

    def _optional_stages(self) -> dict[str, str]:
        """Stages of the dataset that only some runs read."""
        return ({"latents": "latents"} if self.job.latents else {}) | (
            {"own": OWN[self.job.config.own]} if self.job.config.own != "none" else {})

    def plan(self) -> list[Item]:
        dim = dataset_encoder(self.job.database)["dim"]
        if self.job.config.unet.context_dim != dim:
            raise ValueError(f"the network takes vectors of {self.job.config.unet.context_dim}, "
                             f"{self.job.database.label} has vectors of {dim}\nhint: --context-dim {dim}")
        if self.job.latents and self.job.config.image_size:
            raise ValueError("--image-size is for pixels: latents have the size that they were made with")
        unet, shape = self.job.config.unet, (3, 0, 0)
        if self.job.latents:
            shape = self.job.dataset.manifest("latents")["info"]["shape"][1:]
        if unet.in_channels != shape[0] or any(side % unet.stride for side in shape[1:]):
            what = f"latents of {' x '.join(map(str, shape))}" if self.job.latents else "images of 3 channels"
            raise ValueError(f"the network takes {unet.in_channels} channels and sides that divide by {unet.stride}, "
                             f"{self.job.dataset.label} has {what}\nhint: --in-channels, --out-channels and --patch; "
                             f"--latents trains on latents")
        return [Item("run")]

    @property
    def takes_over(self) -> bool:
        """Whether the name was planned with other settings or data, for a run that never made a step."""
        return never_made_a_step(self.job.run) and read_claim(self.folder).fingerprint != fingerprint(
            self, self.inputs())

    def _check_neighbor_count(self, dataset: Dataset) -> None:
        """ValueError unless each sample has at least as many neighbors as the run takes."""
        database, k = self.job.database.label, self.job.config.k
        there = dataset.manifest(f"neighbors/{database}")["info"]["k"]
        if there < k:
            raise ValueError(f"{dataset.label} has {there} neighbors of each sample, the run takes {k}\n"
                             f"hint: python -m jobs neighbors {dataset.name_in_commands} "
                             f"--database {self.job.database.name_in_commands} --k {k} --overwrite")

    def check(self) -> None:
        """ValueError, before anything starts, unless training and validation data fit the run."""
        self._check_neighbor_count(self.job.dataset)
        if self.job.validation is None:
            return
        validation = self.job.validation
        validation.identity("shards")
        validation.identity(f"neighbors/{self.job.database.label}")
        self._check_neighbor_count(validation)
        if (count := validation.manifest("shards")["totals"]["samples"]) < 2:
            raise ValueError(f"{validation.label} has {count} samples: too few to validate with")
        if self.job.config.own != "none":
            self.job.validation.identity(OWN[self.job.config.own])
        if self.job.latents:
            self.job.validation.identity("latents")
            ours, theirs = (dataset.manifest("latents")["info"]["first_stage"]
                            for dataset in (self.job.dataset, validation))
            if ours["sha256"] != theirs["sha256"]:
                raise ValueError(f"the latents of {validation.label} are of another first stage than those of "
                                 f"{self.job.dataset.label}\nhint: python -m jobs latents "
                                 f"{validation.name_in_commands} --first-stage {storage.quote(ours['source'])} "
                                 f"--overwrite")

    def process(self, item: Item, scratch: Any) -> Output:
        """The result of the finished run: its loss curve and its last checkpoint."""
        step = self.job.run.latest_step()
        assert step >= self.job.config.steps, (step, self.job.config.steps)
        lines = read_metrics(self.job.run)
        self.device = lines[-1].get("device", "") if lines else ""
        # Not a hash of metrics.jsonl: it has seconds, which differ between equal runs.
        curve = storage.digest([[line["step"], line["loss"]] for line in lines])
        return Output(samples=step * self.job.config.global_batch,
                      info={"steps": step, "checkpoint": self.job.run.checkpoint(step)["content"], "curve": curve,
                            "loss": lines[-1]["loss"] if lines else None})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Any) -> Output:
        return Output(info=records[0]["info"])
