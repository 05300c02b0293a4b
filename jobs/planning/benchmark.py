"""Measure rates on this machine: run each stage on a sample, for about the given time.

    trial/<hash>/first/       a few images: load libraries, and estimate how many more there is time for
                 images/    shard, embed
                 vectors/     generated vectors: an index and searches need more than an encoder makes in minutes
                 steps/       updates of a network on random numbers

The first three are ordinary roots with datasets. rates_from_manifests.py reads the rates from their manifests.
"""

import itertools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from jobs.planning import rates_from_manifests, synthetic_data
from jobs.planning.cost_model import Build, index_key
from jobs.planning.rates import Rates, TrainRates
from pipeline import storage
from pipeline.bounds import check_bounds
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.clip_weights import RANDOM, ClipConfig, describe_encoder
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index, build_index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.stages.stage import Stage

Run = Callable[[Stage], dict[str, Any]]
_FIRST = 8
# Images to generate for each second of a stage, without a GPU and with one. Generating as many as a GPU embeds in this
# time would take longer than everything else.
_DRAWN_A_SECOND = (7, 35)
_LISTS, _ROWS_A_LIST = (16, 65_536), 160
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """The settings of a measurement."""

    root: str
    build: Build
    source: tuple[str, ...]
    seconds: Annotated[float, Interval(gt=0, lt=inf)]
    workers: Annotated[int, Ge(1)]
    gpu: bool

    def __post_init__(self) -> None:
        check_bounds("measure", self)

    @property
    def place(self) -> str:
        """The folder of the measurement. The same command continues there after an interruption."""
        config = self.build.settings
        what = [asdict(section) for section in (config.shard, config.embed, config.index, config.train)]
        return storage.join(self.root, "trial", storage.digest(json.loads(json.dumps(
            [what, self.source, self.seconds, self.workers, self.gpu, self.build.dim])))[:12])


def rates(trial: Trial, base: Rates, run: Run) -> Rates:
    """The measured rates of all stages, over `base`. The data of the measurement is removed."""
    size = _measure_images(trial, run)
    _measure_vectors(trial, base, run)
    steps = run(synthetic_data.Steps(storage.join(trial.place, "steps"), trial.build.settings.train, trial.build.side,
                           _batch_share(trial), trial.seconds, trial.workers))
    measured_rates = base
    for part in ("pictures", "vectors"):
        measured_rates = rates_from_manifests.rates(storage.join(trial.place, part), measured_rates, gpu=trial.gpu)
    train = TrainRates(_mean(steps, "flop_per_s"), trial.gpu)
    # How many lists true vectors take, made ones do not tell.
    approximate = replace(measured_rates.approximate, nprobe=base.approximate.nprobe)
    measured_rates = measured_rates.with_sections({"train": train, "approximate": approximate},
                                                  _machine_description(trial, steps), time.strftime("%Y-%m-%d"))
    shard = replace(measured_rates.shard, source_bytes=size or measured_rates.shard.source_bytes)
    storage.remove_tree(storage.join(trial.root, "trial"))
    return replace(measured_rates, shard=shard)


def _measure_images(trial: Trial, run: Run) -> float:
    """Measure shard and embed. Returns the bytes of a source image, 0 if unknown."""
    settings, place, size, source = trial.build.settings, trial.place, 0.0, trial.source
    most = sys.maxsize
    if not source:
        most = max(3 * _FIRST * trial.workers, int(trial.seconds * _DRAWN_A_SECOND[trial.gpu] * trial.workers))
        photographs = synthetic_data.Photographs(storage.join(place, "photographs"), most)
        totals = run(photographs)["totals"]
        source, size = (photographs.folder,), totals["bytes"] / totals["samples"]
    embed = replace(settings.embed, pretrained=_available_weights(settings.embed.clip()))

    def shard(part: str, name: str, count: int) -> dict[str, Any]:
        # Two shards for each worker at least, or some would wait.
        each = max(1, min(settings.shard.rows_per_shard, -(-count // (2 * trial.workers))))
        config = replace(settings.shard, source=source, samples_per_shard=each, shard_size="", duplicates="keep")
        dataset = Dataset.parse(storage.join(place, part), name)
        return run(FirstShards(dataset, config, -(-count // each)))

    # The first of a worker loads libraries, at seconds each; of the second the seconds are those of the work.
    rows = {"shard": 1.0, "embed": 1.0}
    for turn in range(2):
        part = "first" if turn == 0 else "pictures"
        for name in rows:
            count = _FIRST * trial.workers
            if turn:
                count = min(most, max(count, int(trial.seconds * rows[name] * trial.workers)))
            manifest = shard(part, name, count)
            if name == "embed":
                manifest = run(Embed(Dataset.parse(storage.join(place, part), name), embed))
            rows[name] = manifest["totals"]["samples"] / max(manifest["run"]["seconds"], 1e-3)
    return size


class FirstShards(Shard):
    """The stage `shard`, limited to the first parts of a source."""

    def __init__(self, dataset: Dataset, config: Any, parts: int) -> None:
        super().__init__(dataset, config)
        self.parts = parts

    def plan(self) -> Any:
        return itertools.islice(super().plan(), self.parts)


def _available_weights(config: ClipConfig) -> str:
    """The weights of the recipe, or random weights if those are missing: both take the same time."""
    try:
        describe_encoder(config)
    except ValueError as error:
        _log.warning("plan: the weights of %s are random, which changes no rate: %s", config.model,
                     storage.first_line(error))
        return RANDOM
    return config.pretrained


def _measure_vectors(trial: Trial, base: Rates, run: Run) -> None:
    """Measure an index in parts, exact search and search by inverted list."""
    root, dim = storage.join(trial.place, "vectors"), trial.build.dim
    # A quarter of the time for the training: lists of few rows would be searched slower than those of a large index.
    lists = 1 << int(math.log2(np.clip(math.sqrt(
        trial.seconds / 4 * base.index.training_flop_per_s / (1280 * dim)), *_LISTS)))
    rows, key = _ROWS_A_LIST * lists, f"IVF{lists}_HNSW32,{_codes(trial, base)}"
    database = synthetic_data.make_vectors(run, root, "database", rows, dim, parts=4 * trial.workers)
    config = IndexConfig(key=key, max_memory="1Ti", part_memory=str(4 * dim * -(-rows // (2 * trial.workers))),
                         train_points=64 * lists, queries=200, target_recall=0.4)
    build_index(Index(database, config), run)
    first = storage.join(trial.place, "first")
    few = synthetic_data.make_vectors(run, first, "database", rows, dim, parts=4 * trial.workers)
    _measure_searches(trial, "exact", (few, database), rows // 64, NeighborsConfig(method="exact", checked=0), run)
    _measure_searches(trial, "listed", (database, database), rows // 64,
                      NeighborsConfig(probes=max(1, min(base.approximate.nprobe, lists // 8))), run)


def _measure_searches(trial: Trial, name: str, databases: tuple[Dataset, Dataset], count: int, config: NeighborsConfig,
                      run: Run) -> None:
    """Search the first database for a few vectors, and the second for as many as the time allows."""
    most = 4 * databases[1].manifest("embeddings")["totals"]["samples"]
    for turn, database in enumerate(databases):
        samples = synthetic_data.make_vectors(run, database.root, f"{name}{turn}", count, trial.build.dim,
                                               parts=2 * trial.workers, seed=2)
        took = run(Neighbors(samples, database, config))["run"]["seconds"]
        count = int(np.clip(count * trial.seconds * trial.workers / 2 / max(took, 1e-3), count, most))


def _codes(trial: Trial, base: Rates) -> str:
    """The codes of the index that the build has, where they are products."""
    codes = re.search(r"PQ(\d+)x8", index_key(trial.build, base))
    if codes and trial.build.dim % int(codes[1]) == 0:
        return codes[0]
    return f"PQ{next(count for count in (128, 64, 32, 16, 8, 4, 2, 1) if trial.build.dim % count == 0)}x8"


def _batch_share(trial: Trial) -> int:
    """Images of the global batch for each process of the build."""
    processes = trial.build.gpus if trial.gpu else trial.build.workers
    return max(1, -(-trial.build.settings.train.global_batch // processes))


def _mean(manifest: dict[str, Any], name: str) -> float:
    return float(np.mean([record["info"][name] for record in manifest["items"]]))


def _machine_description(trial: Trial, steps: dict[str, Any]) -> str:
    """The machine that the rates were measured on, for the file of rates."""
    info = steps["items"][0]["info"]
    network = "" if info["parameters"] == trial.build.network.parameters else (
        f", training of a network of {info['parameters'] / 1e6:.0f} M parameters")
    return (f"{trial.workers} worker{'s' if trial.workers > 1 else ''} on {info['device']}, {info['threads']} "
            f"thread{'s' if info['threads'] > 1 else ''} each{network}, batches of {info['batch']}")
