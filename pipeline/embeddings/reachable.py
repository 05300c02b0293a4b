"""Whether the weights of an encoder are on this machine or can be downloaded, without downloading them."""

import difflib
import json
import os
from pathlib import Path

from pipeline.embeddings.clip_weights import (
    BUNDLED,
    BUNDLED_MODEL,
    OWN_WEIGHTS_SCHEMES,
    RANDOM,
    ClipConfig,
    check_model,
    describe_encoder,
    read_own_weights,
    weights_path,
)
from pipeline.embeddings.hub import CLIP_FILES, is_offered
from pipeline.embeddings.open_clip_door import open_clip


def vector_length(config: ClipConfig) -> int:
    """The length D of the vectors of an encoder, 0 if only its hub knows it.

    ValueError if open_clip has no such model.
    """
    if config.model.startswith("local-dir:"):
        return int(read_own_weights(config)[1]["model_cfg"]["embed_dim"])
    if config.model.startswith(OWN_WEIGHTS_SCHEMES):
        return 0
    if config.model == BUNDLED_MODEL:  # without open_clip, which takes seconds to import
        return int(json.loads((BUNDLED / f"{BUNDLED_MODEL}.json").read_text())["embed_dim"])
    return int(open_clip.get_model_config(check_model(config))["embed_dim"])


def check_weights(config: ClipConfig) -> bool:
    """Whether the weights are on this machine; False if their host offers them for download.

    Reads no weights but those of a folder, and sends a few requests without a body at most. ValueError if there are no
    such weights, or if their host does not answer.
    """
    if config.model.startswith("hf-hub:"):
        return is_offered(config.model, config.model.removeprefix("hf-hub:"), CLIP_FILES)
    if config.model.startswith(OWN_WEIGHTS_SCHEMES) or config.pretrained == "bundled":
        describe_encoder(config)
        return True
    check_model(config)
    if config.pretrained == RANDOM:
        return True
    path = Path(weights_path(config))
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"the weights {path} are an empty file\nhint: copy the file again")
        return True
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        close = (difflib.get_close_matches(config.pretrained, tags, n=1) or tags or ["/path/to/weights"])[0]
        raise ValueError(f"--embed.pretrained {config.pretrained}: expected a file or a tag of {config.model}, got "
                         f"neither\nhint: --embed.pretrained {close}")
    repository, file = os.path.split(tag.get("hf_hub", ""))
    if not repository:  # an old tag with a URL alone
        return False
    return is_offered(f"{config.model} ({config.pretrained})", repository, (file,) if file else CLIP_FILES)
