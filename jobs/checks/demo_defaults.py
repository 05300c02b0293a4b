"""Settings that are meant for the demo, named where another source is built without a recipe."""

import logging

from jobs.config.settings import Settings
from model import recipes as networks
from pipeline.embeddings.clip_weights import BUNDLED_MODEL

_log = logging.getLogger(__name__)


def mention_demo_defaults(settings: Settings, *, embeds: bool, trains: bool) -> bool:
    """Log one line if no recipe was named and the settings are the demo's. Returns whether they are."""
    parts = [f"the encoder {BUNDLED_MODEL} was trained on emoji"] if embeds and settings.embed.model == BUNDLED_MODEL \
        else []
    if trains and settings.train.unet == networks.tiny().unet:
        parts.append("the network is a small one for a first try")
    if parts:
        _log.warning("no --recipe is named, and the defaults are for the demo: %s. Type --recipe NAME (python -m jobs "
                     "recipes lists them), or --recipe tiny to keep the defaults", ", and ".join(parts))
    return bool(parts)
