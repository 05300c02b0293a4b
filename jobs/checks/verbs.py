"""The checks of each verb that works for long: pipeline, rebuild, train."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.checks import inputs, machine, settings
from jobs.checks.check import Check
from jobs.checks.estimate import count_at_least, estimate_bytes
from jobs.checks.source import check_source
from jobs.cluster.config import ClusterConfig
from jobs.cluster.gpus import check_gpus
from jobs.config.settings import Settings
from jobs.publishing.consumers import list_consumer_encoders
from jobs.runs.run import Run
from jobs.training.train_stage import Job, Training
from model.config import TrainConfig
from model.training.flops import count_parameters, training_bytes
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.embed import Embed
from pipeline.embeddings.reachable import vector_length
from pipeline.releases.published import Published
from pipeline.storage import DamagedFile


@dataclass(frozen=True)
class PlannedBuild:
    """The dataset and the settings that `pipeline` or `rebuild` would make it with."""

    dataset: Dataset
    settings: Settings
    database: str = ""
    """Database of the neighbors; "": the dataset itself, if there is a run."""
    run: str = ""
    """The run to train, if any."""
    local: bool = False
    here: bool = True
    """Whether this machine does the work. Otherwise only what the settings and a shared root tell is checked."""

    @property
    def has_published(self) -> bool:
        """Whether a version of the dataset is published, a damaged or unsigned one too."""
        try:
            return bool(Published.load(self.dataset.root, self.dataset.name).version)
        except DamagedFile:
            return True


def pipeline_checks(build: PlannedBuild) -> Iterator[Check]:
    """The checks of `pipeline`."""
    yield from _place_checks(build)
    if not (build.here and build.dataset.is_sealed("embeddings")):
        yield from _encoder_checks(build)
    if build.database and can_read(build.dataset.root, here=build.here):
        yield Check("database", partial(inputs.check_database, build.dataset.root, build.database,
                                        build.settings.embed.clip()))
    if build.run:
        yield from _run_checks(build)
    stages = ["shards", "embeddings", "index", *(["neighbors"] if build.database or build.run else []),
              *(["train"] if build.run else [])]
    missing = [stage for stage in stages if not (build.here and _is_sealed(build, stage))]
    yield from _gpu_checks(build, missing)
    if build.here:
        yield Check("disk", partial(_check_disk, build, missing))
        if "train" in missing:
            yield from _memory_checks(build.settings.train, build.settings.cluster, local=build.local)


def rebuild_checks(build: PlannedBuild) -> Iterator[Check]:
    """The checks of `rebuild`. The encoder must be that of the published version and of the runs that use it."""
    yield from _place_checks(build)
    yield from _encoder_checks(build)
    if not build.settings.rebuild.allow_encoder and can_read(build.dataset.root, here=build.here):
        yield Check("consumers", partial(_check_consumers, build))
    yield from _gpu_checks(build, ["embeddings"])
    # A version takes over most bytes of the one before, so only the first can be estimated.
    if build.here and not build.has_published:
        yield Check("disk", partial(_check_disk, build, ["shards", "embeddings", "index"]))


def train_checks(job: Job, cluster: ClusterConfig, *, local: bool, here: bool = True) -> Iterator[Check]:
    """The checks of `train`: all that its stage would refuse, and what this machine has."""
    training, config = Training(job), job.config
    yield Check("gpus", partial(check_gpus, training, cluster))
    if not job.latents:
        yield Check("channels", partial(settings.check_channels, config))
    if not local:
        yield Check("processes", partial(settings.check_processes, config, cluster.workers))
    if can_read(job.run.root, here=here):
        yield Check("inputs", training.inputs)
        yield Check("network", training.plan)
        yield Check("data", training.check)
        if not job.latents:
            yield Check("image size", partial(inputs.check_stored_images, job.dataset, config))
    if here and not storage.exists(storage.join(job.run.folder, "manifest.json")):
        parameters = count_parameters(config.unet)
        yield Check("root", partial(machine.check_root, job.run.root))
        yield Check("gpu here", partial(machine.check_gpus_here, cluster, local=local))
        yield Check("disk", partial(machine.check_disk, job.run.root, estimate_bytes(
            Settings(train=config), 1, config.unet.context_dim, ("train",), parameters)))
        yield from _memory_checks(config, cluster, local=local)


def can_read(root: str, *, here: bool) -> bool:
    """Whether the root can be looked at: a job's root may be out of reach for who submits it."""
    return here or (storage.is_local(root) and storage.local_path(root).is_dir())


def _place_checks(build: PlannedBuild) -> Iterator[Check]:
    if build.here:
        yield Check("root", partial(machine.check_root, build.dataset.root))
        yield Check("source", partial(check_source, build.settings.shard.source))


def _encoder_checks(build: PlannedBuild) -> Iterator[Check]:
    if build.here:
        yield Check("encoder", partial(inputs.check_encoder, build.settings.embed.clip()))


def _check_consumers(build: PlannedBuild) -> None:
    root, name = build.dataset.root, build.dataset.name
    encoders: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(ValueError):  # a rebuild replaces a damaged version
        pointer = Published.load(root, name)
        encoders = list_consumer_encoders(root, name, pointer.open() if pointer.version else None)
    for consumer, description in encoders.items():
        inputs.check_vectors(consumer, description, build.settings.embed.clip())


def _run_checks(build: PlannedBuild) -> Iterator[Check]:
    config, shard, name = build.settings.train, build.settings.shard, build.dataset.name
    if can_read(build.dataset.root, here=build.here):
        run, database = Run.parse(build.dataset.root, build.run), build.database or name
        yield Check("run name", partial(inputs.check_run_name, run, name, database, config))
    yield Check("image size", partial(settings.check_image_size, shard, config))
    if build.here and shard.source:
        yield Check("images", partial(inputs.check_training_images, build.dataset, shard, config))
    yield Check("channels", partial(settings.check_channels, config))
    yield Check("vectors", partial(settings.check_context_dim, config, build.settings.embed.clip()))
    yield Check("neighbors", partial(settings.check_neighbor_count, build.settings.neighbors, config))
    if not build.local:
        yield Check("processes", partial(settings.check_processes, config, build.settings.cluster.workers))


def _gpu_checks(build: PlannedBuild, stages: Collection[str]) -> Iterator[Check]:
    """Whether the workers of these stages can use the GPUs that they reserve, and this machine has any."""
    cluster = build.settings.cluster
    if "embeddings" in stages:
        yield Check("gpus", lambda: check_gpus(Embed, cluster))
    if "train" in stages:
        yield Check("gpus", lambda: check_gpus(Training, cluster))
    if build.here and {"embeddings", "train"}.intersection(stages):
        yield Check("gpu here", partial(machine.check_gpus_here, cluster, local=build.local))


def _is_sealed(build: PlannedBuild, stage: str) -> bool:
    if stage == "train":
        return storage.exists(storage.join(Run.parse(build.dataset.root, build.run).folder, "manifest.json"))
    if stage == "neighbors":
        stage = f"neighbors/{Dataset.parse(build.dataset.root, build.database or build.dataset.name).label}"
    return build.dataset.is_sealed(stage)


def _check_disk(build: PlannedBuild, stages: Collection[str]) -> None:
    images = count_at_least(build.settings.shard)
    length = vector_length(build.settings.embed.clip())
    parameters = count_parameters(build.settings.train.unet) if "train" in stages else 0
    machine.check_disk(build.dataset.root, estimate_bytes(build.settings, images, length, stages, parameters))


def _memory_checks(config: TrainConfig, cluster: ClusterConfig, *, local: bool) -> Iterator[Check]:
    """Whether the network of a run fits the memory of this machine, if it is trained here on the CPU."""
    if local and not config.fsdp and not machine.uses_gpu(cluster):
        yield Check("memory", partial(machine.check_memory, training_bytes(config), "the network"))
