"""A root that went through all stages, and the rates measured there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.planning import rates, rates_from_manifests
from jobs.planning.rates import Rates
from jobs.runs.run import Run
from jobs.training.train_stage import Job, Training
from jobs.training.worker import train_in_processes
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.embed import Embed
from pipeline.indices.index import Index
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.stages.driver import run_stage
from tests.jobs.planning.planned_run import SETTINGS


@pytest.fixture(scope="session")
def planned_root(tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> Path:
    """144 synthetic images with all stages: neighbors by an index and by exact search, and a run."""
    folder = tmp_path_factory.mktemp("plan")
    dataset, twin = Dataset.parse(str(folder), "drawn"), Dataset.parse(str(folder), "twin")
    for stage in (Shard(dataset, replace(SETTINGS.shard, source=str(drawn_pictures))), Embed(dataset, SETTINGS.embed)):
        run_stage(stage)
    shutil.copytree(folder / "datasets/drawn", folder / "datasets/twin")
    run_stage(Index(dataset, SETTINGS.index))
    run_stage(Neighbors(dataset, dataset, SETTINGS.neighbors))
    run_stage(Neighbors(dataset, twin, replace(SETTINGS.neighbors, method="exact")))
    job = Job(Run.parse(str(folder), "run"), dataset, dataset, SETTINGS.train)
    train_in_processes(job)
    run_stage(Training(job))
    return folder


@pytest.fixture(scope="session")
def known(planned_root: Path) -> Rates:
    return rates_from_manifests.rates(str(planned_root), rates.built_in())
