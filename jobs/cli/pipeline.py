"""`python -m jobs pipeline`: all stages of a dataset, one after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import tyro

from jobs.cli.data import (
    EmbedOptions,
    IndexOptions,
    NeighborsOptions,
    ShardOptions,
    embed,
    run_index,
    run_neighbors,
    run_shard,
)
from jobs.cli.model import TrainOptions, run_train
from jobs.cli.options import CommonOptions, Dataset, Flat, ResultAsJson, StageOptions
from jobs.cli.publish import import_torch_first
from jobs.cli.run_stage import suggest_once
from jobs.cluster.config import ClusterConfig
from jobs.config.settings import Settings
from jobs.telemetry import output
from model.config import TrainConfig
from pipeline import storage
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.sources.config import ShardConfig


@dataclass(frozen=True)
class PipelineOptions:
    """Run all stages of a dataset: shards, embeddings, index, and on request neighbors and a training run."""

    examples: ClassVar = ("pipeline mine --source ~/images --local",
                          "pipeline art --source 's3://lists/*.parquet' --train myrun --root s3://bucket/rdm "
                          "--dry-run")

    dataset: Dataset
    shard: Flat[ShardConfig]
    embed: EmbedConfig
    index: IndexConfig
    neighbors: NeighborsConfig
    train: TrainConfig
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    database: str = ""
    """Also find the neighbors of its images in this database."""
    train_run: Annotated[str, tyro.conf.arg(name="train", metavar="RUN")] = ""
    """Also train this run, with neighbors in the database or, without one, in the dataset itself."""
    json: ResultAsJson = False


def run_pipeline(options: PipelineOptions) -> int:
    from pipeline.indices.choose import check_autofaiss
    dry_run, missing_folder = options.common.dry_run, ""
    if options.train_run and not dry_run:
        import_torch_first()
    if not dry_run:
        check_autofaiss()
    mentioned = check_pipeline(options)
    with suggest_once():
        for verb, run, verb_options, folder in _steps(options, mention_defaults=not mentioned):
            if missing_folder:
                waits = {"stage": verb, "folder": folder, "waits_for": missing_folder}
                output.print_document(waits, as_json=options.json)
                continue
            if code := run(verb_options):
                return code
            if dry_run and not storage.exists(storage.join(folder, "manifest.json")):
                missing_folder = folder
    return 0


def check_pipeline(options: PipelineOptions, *, here: bool = True, mention: bool = True) -> bool:
    """Run the checks of the pipeline. Returns whether it named settings of the demo.

    `here`: this machine does the work. `mention`: name such settings.
    """
    from jobs.checks.check import run_checks
    from jobs.checks.demo_defaults import mention_demo_defaults
    from jobs.checks.verbs import PlannedBuild, pipeline_checks
    from pipeline.datasets.dataset import Dataset as DatasetPlace
    settings = Settings(shard=options.shard, embed=options.embed, index=options.index, neighbors=options.neighbors,
                        train=options.train, cluster=options.cluster)
    dataset = DatasetPlace.parse(options.common.root, options.dataset)
    build = PlannedBuild(dataset, settings, options.database, options.train_run, options.common.local, here)
    run_checks(pipeline_checks(build))
    if mention and not (options.common.names_recipe or (here and dataset.is_sealed("embeddings"))):
        return mention_demo_defaults(settings, embeds=True, trains=bool(options.train_run))
    return False


def _steps(options: PipelineOptions, *, mention_defaults: bool) -> Iterator[tuple[str, Callable[[Any], int], Any, str]]:
    """Each verb with its function, its options, and the folder that it seals."""
    from jobs.runs.run import Run
    from pipeline.datasets import dataset as datasets
    name, cluster, common, stage = options.dataset, options.cluster, options.common, StageOptions(json=options.json)
    dataset = datasets.Dataset.parse(common.root, name)
    database = datasets.Dataset.parse(common.root, options.database or name)
    yield "shard", run_shard, ShardOptions(name, options.shard, cluster, common, stage), dataset.folder("shards")
    yield "embed", embed, EmbedOptions(name, options.embed, cluster, common, stage), dataset.folder("embeddings")
    yield "index", run_index, IndexOptions(name, options.index, cluster, common, stage), dataset.folder("index")
    if options.database or options.train_run:
        yield ("neighbors", run_neighbors,
               NeighborsOptions(name, options.neighbors, cluster, common, stage, database.label),
               dataset.folder(f"neighbors/{database.label}"))
    if options.train_run:
        yield ("train", partial(run_train, mention_defaults=mention_defaults),
               TrainOptions(options.train_run, name, options.train, cluster, common, stage, database.label),
               Run.parse(common.root, options.train_run).folder)
