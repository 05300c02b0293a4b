"""Checks of what a command reads: its source, its database, the images for training, and the name of the run."""

import io
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from jobs.checks.settings import check_side, has_one_size
from jobs.runs.metrics import never_made_a_step
from jobs.runs.run import Run
from model.config import TrainConfig, identity
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.embeddings.embed import dataset_encoder
from pipeline.embeddings.reachable import check_weights, vector_length
from pipeline.media.types import LONG_SIDE_MODES, BadImage
from pipeline.releases import published
from pipeline.rows.rows import ReadReport, Row
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.source import Source
from pipeline.stages.scratch import scratch_folder

_log = logging.getLogger(__name__)
_SAMPLED_IMAGES = 64
_SQUARES = "--resize center_crop makes squares of one size"


def check_training_images(dataset: Dataset, shard: ShardConfig, train: TrainConfig) -> None:
    """ValueError if the images of a dataset, or of the source that it is made from, do not fit the network.

    Looks at the first shard, or at the first images of the source. Passes with a warning if the source has only URLs.
    """
    if dataset.is_sealed("shards"):
        check_stored_images(dataset, train)
    elif not has_one_size(shard):
        _check_sizes(_sizes_of_source(shard), f"the images of {', '.join(shard.source)}, with --resize {shard.resize},",
                     train, _SQUARES)


def check_stored_images(dataset: Dataset, train: TrainConfig) -> None:
    """ValueError if the images in the first shard of a dataset do not fit the network."""
    _check_sizes(stored_sizes(dataset), f"the images of {dataset.label}", train, f"python -m jobs shard "
                 f"{dataset.name}@v2 --source SOURCE --resize center_crop, which makes squares of one size")


def stored_sizes(dataset: Dataset) -> Iterator[tuple[int, int]]:
    """Width and height of the images in the first shard of a dataset."""
    record = dataset.manifest("shards")["items"][0]
    for row in metadata(dataset, record, ["width", "height"]):
        if row.get("width") and row.get("height"):
            yield row["width"], row["height"]


def _check_sizes(sizes: Iterator[tuple[int, int]], whose: str, train: TrainConfig, hint: str) -> None:
    distinct = list(dict.fromkeys(sizes))
    if len(distinct) > 1:
        named = ", ".join(f"{width} x {height}" for width, height in distinct[:3])
        raise ValueError(f"{whose} have different sizes: expected one size for training, got {named}"
                         f"{', ...' if distinct[3:] else ''}\nhint: {hint}")
    for width, height in distinct:
        check_side(train, height, width, hint)


def _sizes_of_source(config: ShardConfig) -> Iterator[tuple[int, int]]:
    """Width and height that the first images of a source will have in the shards. None for URLs."""
    source = open_source(config)
    if source.fetch == "url":
        _log.warning("training needs images of one size, and --resize %s keeps their shapes. The source has only URLs, "
                     "so this is not checked.\nhint: %s", config.resize, _SQUARES)
        return
    with scratch_folder("source") as scratch:
        for row in itertools.islice(_first_rows(source, scratch), _SAMPLED_IMAGES):
            try:
                data = row.data if row.data is not None else source.read(row)  # type: ignore[attr-defined]
                with Image.open(io.BytesIO(data)) as image:
                    size = (image.height, image.width) if _is_turned(image) else image.size
            except (BadImage, UnidentifiedImageError, OSError, Image.DecompressionBombError):
                continue  # the stage counts it and leaves it out
            yield _resized(*size, config)


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation swaps width and height."""
    return image.getexif().get(0x0112, 1) in {5, 6, 7, 8}


def _first_rows(source: Source, scratch: Path) -> Iterator[Row]:
    for part in itertools.islice(source.parts(), 1):
        for name, data in part.carries:
            storage.put_bytes(data, storage.join(str(scratch), name))
        yield from source.allowed_rows(str(scratch), part.inputs, scratch, ReadReport())


def _resized(width: int, height: int, config: ShardConfig) -> tuple[int, int]:
    """Width and height after `resize`, as pipeline/media/resize.py computes them."""
    if config.resize == "no":
        return width, height
    longest = config.resize in LONG_SIDE_MODES
    side = max(width, height) if longest else min(width, height)
    wanted = min(config.image_size, side) if config.only_if_bigger else config.image_size
    if config.resize == "center_crop":
        return wanted, wanted
    smallest = 1 if longest else wanted
    return max(smallest, round(width * wanted / side)), max(smallest, round(height * wanted / side))


def check_encoder(encoder: ClipConfig) -> None:
    """ValueError if the encoder of the settings cannot be loaded, or its weights not be downloaded."""
    vector_length(encoder)
    if not check_weights(encoder):
        _log.info("the weights of %s (%s) are downloaded first", encoder.model, encoder.pretrained)


def check_database(root: str, label: str, encoder: ClipConfig) -> None:
    """ValueError if a database has no index, or was made with another encoder."""
    database = published.open_dataset(root, label)
    database.manifest("index")
    check_vectors(database.label, dataset_encoder(database), encoder)


def check_vectors(name: str, description: dict[str, Any], encoder: ClipConfig) -> None:
    """ValueError if vectors with this description of their encoder are not those of `encoder`.

    Compares lengths alone while the weights are not on this machine.
    """
    try:
        wanted = describe_encoder(encoder) if check_weights(encoder) else {"dim": vector_length(encoder) or None}
    except ValueError:  # check_encoder says so
        return
    if differing := [key for key, value in wanted.items() if value is not None and description.get(key) != value]:
        there = f"{description.get('model', 'unknown')} ({description.get('pretrained', 'unknown')})"
        raise ValueError(f"{name} was made with another encoder ({', '.join(differing)}): expected {there}, got "
                         f"{encoder.model} ({encoder.pretrained})\nhint: --embed.model {description.get('model')} "
                         f"--embed.pretrained {description.get('pretrained')}")


def check_run_name(run: Run, dataset: str, database: str, train: TrainConfig) -> None:
    """ValueError if the name belongs to a run with other data or settings that has made a step."""
    if not (there := run.planned()) or never_made_a_step(run):
        return
    wanted = {"dataset": dataset, "database": database, "train": identity(train)}
    differing = [name for name in wanted if _without_version(there.get(name)) != _without_version(wanted[name])]
    if differing:
        raise ValueError(f"the run name {run.name} is taken: expected the same {' and '.join(differing)} as in "
                         f"{run.folder}, got others\nhint: another name for the run; or python -m jobs rm "
                         f"runs/{run.name}, then the same command again")


def _without_version(value: Any) -> Any:
    return value.partition("@")[0] if isinstance(value, str) else value
