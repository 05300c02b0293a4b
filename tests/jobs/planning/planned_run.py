"""The settings of a small run, and its estimated costs."""

from dataclasses import replace

from jobs.config.settings import Settings
from jobs.planning.cost_model import Build, Cost, costs
from jobs.planning.rates import Rates
from model import recipes
from model.training import flops
from pipeline.embeddings import clip
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.sources.config import ShardConfig

_TINY = recipes.tiny()
SETTINGS = Settings(
    shard=ShardConfig(samples_per_shard=50, image_size=32, format="png"), embed=EmbedConfig(batch_size=16),
    index=IndexConfig(key="IVF8,SQ8"), neighbors=NeighborsConfig(k=5, probes=1, checked=20, vectors=True),
    train=replace(_TINY, steps=6, global_batch=2, log_every=2, checkpoint_every=3, k=2,
                  unet=replace(_TINY.unet, model_channels=32)))
NETWORK = flops.Size(forward=1e9, parameters=1000)


def make_build(pictures: int = 144, rows: int = 0, settings: Settings = SETTINGS, **changes) -> Build:
    operations, dim = clip.flop_per_image(settings.embed.clip())
    network = flops.size(settings.train.unet, settings.shard.image_size, settings.train.k)
    return Build(settings, pictures, rows, dim, operations, network, **changes)


def costs_by_stage(build: Build, known: Rates) -> dict[str, Cost]:
    return {cost.stage: cost for cost in costs(build, known)}
