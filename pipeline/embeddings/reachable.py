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
from pipeline.embeddings.open_clip_door import open_clip

_HUB_ANSWER_S = 5.0
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip looks for them
_COPY = "on a machine without network, copy the file here and name it: --embed.pretrained /path/to/weights"


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
        return _is_offered(config.model, config.model.removeprefix("hf-hub:"), _HUB_FILES)
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
    return _is_offered(f"{config.model} ({config.pretrained})", repository, (file,) if file else _HUB_FILES)


def _is_offered(name: str, repository: str, files: tuple[str, ...]) -> bool:
    """Whether a file of a repository is in the cache of the hub's client; False if the hub offers one of them."""
    import huggingface_hub
    from huggingface_hub import errors
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in files):
        return True
    for file in files:
        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file), timeout=_HUB_ANSWER_S)
            return False
        except errors.EntryNotFoundError:
            continue
        except errors.RepositoryNotFoundError:  # also one that needs a login
            raise ValueError(f"the weights of {name} do not exist: the hub has no {repository} that this user may "
                             f"read\nhint: hf auth login, or --embed.pretrained /path/to/weights") from None
        except Exception as error:  # what the hub's client raises has no common type
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(f"the weights of {name} are not on this machine, and the hub cannot be reached: {reason}"
                             f"\nhint: {_COPY}") from None
    raise ValueError(f"the weights of {name} do not exist: {repository} has none of {', '.join(files)}\n"
                     f"hint: --embed.pretrained /path/to/weights")
