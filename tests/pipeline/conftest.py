"""Data that is made once for all tests of the pipeline: synthetic images, and a dataset that has every stage."""

import shutil
from pathlib import Path

import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_stage
from tests.pipeline import synthetic


@pytest.fixture(scope="session", autouse=True)
def _private_cache(private_cache: None) -> None:
    pass


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 72 synthetic images, 12 subjects in six styles, with captions."""
    return synthetic.drawings(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Dataset:
    """The images in three shards with embeddings, an index, and neighbors among themselves; not to be changed."""
    from pipeline.embeddings.config import EmbedConfig
    from pipeline.embeddings.embed import Embed
    from pipeline.indices.config import IndexConfig
    from pipeline.indices.index import Index
    from pipeline.neighbors.config import NeighborsConfig
    from pipeline.neighbors.neighbors import Neighbors
    from pipeline.shards.shard import Shard
    from pipeline.sources.config import ShardConfig
    dataset = Dataset.parse(str(tmp_path_factory.mktemp("root")), "drawn")
    for stage in (
        Shard(dataset, ShardConfig(source=str(pictures), samples_per_shard=30, image_size=32, format="png")),
        Embed(dataset, EmbedConfig(batch_size=16)),
        Index(dataset, IndexConfig()),
        Neighbors(dataset, dataset, NeighborsConfig(k=4)),
    ):
        run_stage(stage)
    return dataset


@pytest.fixture
def copied(tmp_path: Path, built: Dataset) -> Dataset:
    """A copy of the built dataset that a test may change."""
    shutil.copytree(built.root, tmp_path / "root")
    return Dataset(str(tmp_path / "root"), built.name, built.version)
