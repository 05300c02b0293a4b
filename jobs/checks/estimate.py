"""Bytes that a command will write, from the formulas of `plan` and a short look at the source."""

import contextlib
import os
import time
from collections.abc import Collection

import pyarrow.parquet as pq

from jobs.config.settings import Settings
from jobs.planning import cost_model, rates
from jobs.planning.cost_model import Build
from model.training.flops import Size
from pipeline import storage
from pipeline.media.types import SUFFIXES
from pipeline.sources.config import ShardConfig

_LOOK_S = 1.0
_COSTS = {"shards": cost_model.shard, "embeddings": cost_model.embed, "index": cost_model.index,
          "neighbors": cost_model.neighbors_exact, "train": cost_model.train}


def count_at_least(config: ShardConfig) -> int:
    """Images of the local folders and parquet files of a source, as far as a second of looking finds them."""
    if config.where or config.licenses or config.only_captioned:  # most rows may be left out
        return 0
    end, count = time.monotonic() + _LOOK_S, 0
    for source in config.source:
        place = storage.local_path(source) if storage.is_local(source) else None
        if place and place.is_file() and place.suffix == ".parquet":
            with contextlib.suppress(ValueError, OSError):  # the stage names what is wrong with it
                count += pq.read_metadata(place).num_rows
        elif place and place.is_dir():
            for _, _, names in os.walk(place):
                count += sum(name.lower().endswith(SUFFIXES) for name in names)
                if time.monotonic() > end:
                    return count
    return count


def estimate_bytes(settings: Settings, images: int, vector_length: int, stages: Collection[str],
                   parameters: int = 0) -> float:
    """Bytes that `stages` keep below the root for so many images. `parameters`: those of the network."""
    build = Build(settings, images, 0, vector_length, 0.0, Size(0.0, parameters))
    return sum(_COSTS[stage](build, rates.built_in()).bytes_kept for stage in stages)
