"""Settings that are meant for the demo, named where other images are used with them."""

import logging

from jobs.checks.inputs import stored_sizes
from jobs.config import recipes
from jobs.config.settings import Settings
from model import recipes as networks
from model.config import TrainConfig
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.clip_weights import BUNDLED_MODEL

_log = logging.getLogger(__name__)


def mention_demo_defaults(settings: Settings, *, embeds: bool, trains: bool) -> bool:
    """Log one line if no recipe was named and the settings are the demo's. Returns whether they are."""
    parts = [f"the encoder {BUNDLED_MODEL} was trained on emoji"] if embeds and settings.embed.model == BUNDLED_MODEL \
        else []
    if trains and settings.train.unet == networks.tiny().unet:
        parts.append("the network is a small one for a first try")
    if parts:
        _log.warning("no --recipe is named, and the defaults are for the demo: %s\nhint: --recipe NAME, of those of "
                     "python -m jobs recipes; --recipe tiny keeps the defaults", ", and ".join(parts))
    return bool(parts)


def mention_large_images(dataset: Dataset, train: TrainConfig) -> None:
    """Log one line if the network of the recipe tiny is to train on images that are larger than those of the recipe."""
    side = recipes.tiny().shard.image_size
    width, height = next(stored_sizes(dataset), (side, side))
    if train.image_size or train.unet != networks.tiny().unet or width * height <= side * side:
        return
    smaller = (f"--image-size {side} averages them down" if width == height and width % side == 0 else
               f"python -m jobs shard {dataset.name}@v2 --source SOURCE --image-size {side}")
    _log.warning("the images of %s have %d x %d pixels, and this small network is meant for %d x %d: a step takes "
                 "about %d times as long\nhint: %s", dataset.label, width, height, side, side,
                 round(width * height / side ** 2), smaller)
