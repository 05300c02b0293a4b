"""Roots to work in: empty, with a dataset, with a training run."""

import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage

STYLES = ("flat", "hatched", "outline")


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An empty root."""
    return str(tmp_path / "root")


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> Path:
    """A root with a synthetic dataset that has everything training needs; copy it before use."""
    root = tmp_path_factory.mktemp("prepared") / "root"
    dataset = Dataset.parse(str(root), "drawn")
    for stage in (Shard(dataset, ShardConfig(source=str(drawn_pictures), captions=str(drawn_pictures / "train.csv"),
                                             only_captioned=True, image_size=32, format="png", samples_per_shard=50)),
                  Embed(dataset, EmbedConfig()), Index(dataset, IndexConfig(bytes_per_vector=288)),
                  Neighbors(dataset, dataset, NeighborsConfig())):
        run_stage(stage)
    return root


@pytest.fixture(scope="session")
def trained_root(prepared_root: Path, drawn_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run of a few steps and a database of each of three styles; copy it before use."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(prepared_root, root)
    for style in STYLES:
        dataset = Dataset.parse(str(root), style)
        captions = str(drawn_pictures / f"{style}.csv")
        for stage in (Shard(dataset, ShardConfig(source=str(drawn_pictures), captions=captions, only_captioned=True,
                                                 image_size=32, format="png")),
                      Embed(dataset, EmbedConfig()), Index(dataset, IndexConfig(bytes_per_vector=288))):
            run_stage(stage)
    (root / "settings.toml").write_text('[train]\nsteps = 3\nglobal_batch = 8\nprecision = "fp32"\nimage_size = 16\n'
                                        "[train.unet]\nmodel_channels = 32\n")
    assert main(["train", "small", "--dataset", "drawn", "--root", str(root), "--config",
                     str(root / "settings.toml"), "--local"]) == 0
    return root
