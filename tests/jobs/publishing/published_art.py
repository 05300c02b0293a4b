"""A published dataset of synthetic images, and changes to its source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.publishing.config import RebuildConfig
from jobs.publishing.rebuild import Rebuild, run_rebuild
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.releases import published
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.takedowns import hidden_rows
from tests.pipeline import synthetic

NAME = "drawn"


SHARD = ShardConfig(image_size=32, format="png", samples_per_shard=30)


def make_rebuild(root: Path | str, source: Path | str, shard: ShardConfig = SHARD, key: str = "",
                 name: str = NAME, **settings: Any) -> Rebuild:
    """A rebuild of a folder of synthetic images."""
    return Rebuild(str(root), name, replace(shard, source=(str(source),)), EmbedConfig(),
                   IndexConfig(bytes_per_vector=288, key=key), RebuildConfig(**settings))


def rebuild(root: Path | str, source: Path | str, **settings: Any) -> dict[str, Any]:
    return run_rebuild(make_rebuild(root, source, **settings), run_stage)


def published_dataset(root: Path | str) -> Dataset:
    return published.open_dataset(str(root), NAME)


def pointer(place: Path) -> Path:
    """The file that names the published version."""
    return place / "root" / "datasets" / NAME / "current.json"


def vectors_by_content(dataset: Dataset) -> dict[str, np.ndarray]:
    """The vectors of what can be found, by the name of the image and the hash of its bytes."""
    rows = [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]
    hidden = set(hidden_rows.read_hidden_rows(dataset).tolist())
    vectors = Embeddings(dataset).all()
    return {f"{row['url']} {row['original_sha256']} {row['caption']}": vectors[number]
            for number, row in enumerate(rows) if number not in hidden}


def paint(path: Path, seed: int) -> None:
    synthetic.noise(32, 32, seed).save(path)


def pictures(place: Path) -> list[Path]:
    return sorted((place / "source").rglob("*.png"))


def drop(place: Path, path: Path) -> None:
    """Take an image and its caption out of the source."""
    path.unlink()
    captions = place / "source" / "captions.csv"
    name = str(path.relative_to(place / "source"))
    captions.write_text("".join(line for line in captions.read_text().splitlines(True) if not line.startswith(name)))
