"""Names, descriptions and hashes of CLIP weights."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline import storage
from pipeline.bounds import check_bounds
from pipeline.embeddings.hub import CLIP_FILES, is_offered
from pipeline.embeddings.open_clip_door import open_clip

BUNDLED = Path(__file__).parent / "tiny_clip"
BUNDLED_MODEL = "tiny-clip-64"
INSTALL_AGAIN = "hint: pip install --force-reinstall --no-deps . in the folder of the program, or its image again"
_BUNDLED_WEIGHTS = BUNDLED / "tiny_clip.safetensors"
RANDOM = "random"
# Defaults of open_clip: the values of the first CLIP models.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
OWN_WEIGHTS_SCHEMES = ("hf-hub:", "local-dir:")  # schemes of names whose weights and settings lie in one folder
_CONFIG = "open_clip_config.json"
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ClipConfig:
    """Which encoder makes the vectors."""

    model: str = "tiny-clip-64"
    """Name of an open_clip model, hf-hub:ORGANISATION/NAME, or local-dir:FOLDER (with open_clip_config.json)."""
    pretrained: str = "bundled"
    """A pretrained tag of open_clip, or a local file of weights. `bundled`: the weights that come with the tiny CLIP, a
    model of a hub or a folder. `random`: random weights, for measurements of speed."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, and on a CPU that multiplies in bf16; fp32 elsewhere."""

    def __post_init__(self) -> None:
        check_bounds("embed", self)


@lru_cache(maxsize=8)
def describe_encoder(config: ClipConfig) -> dict[str, Any]:
    """Model, sha256 of the weights, preprocessing and normalization: encoders with equal descriptions are the same.

    It loads no weights, so a driver can call it.
    """
    if config.model.startswith(OWN_WEIGHTS_SCHEMES):
        path, document = read_own_weights(config)
        architecture, tag = document["model_cfg"], document.get("preprocess_cfg") or {}
    else:
        path, architecture, tag = read_tagged_weights(config)
    preprocessing = {"image_size": architecture["vision_cfg"].get("image_size", 224),
                     "mean": list(tag.get("mean") or _MEAN), "std": list(tag.get("std") or _STD),
                     "interpolation": tag.get("interpolation") or "bicubic",
                     "resize": tag.get("resize_mode") or "shortest"}
    if tag.get("fill_color"):
        preprocessing["fill_color"] = tag["fill_color"]
    # The place of a folder or of a file may be another on every machine; what is in it is in the hashes.
    return {"model": "local-dir" if config.model.startswith("local-dir:") else config.model,
            "pretrained": config.pretrained if config.pretrained in {"bundled", RANDOM} or tag else "file",
            "weights_sha256": storage.sha256_file(Path(path)) if path else RANDOM,
            "architecture_sha256": hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest(),
            "dim": architecture["embed_dim"], "preprocessing": preprocessing, "normalised": True}


def check_encoder(encoder: ClipConfig, name: str, description: dict[str, Any]) -> None:
    """ValueError unless the vectors of `name`, whose encoder has this description, are those of `encoder`."""
    wanted = describe_encoder(encoder)
    if differing := [key for key in wanted if wanted[key] != description.get(key)]:
        raise ValueError(f"{name} belongs to another encoder than {encoder.model} ({encoder.pretrained}): "
                         f"they differ in {', '.join(differing)}\n"
                         f"hint: --model and --pretrained as when it was embedded")


def encoder_of(name: str, description: dict[str, Any], default: ClipConfig | None = None) -> ClipConfig:
    """The encoder with this description, which is that of `name`. It is `default` if that has the description.

    ValueError if its weights are in a file or a folder: a description does not say where that is.
    """
    default = default or ClipConfig()
    if describe_encoder(default) == description:
        return default
    if missing := sorted({"model", "pretrained"} - description.keys()):
        raise storage.DamagedFile(f"{name} does not say which encoder it belongs to: expected {' and '.join(missing)}, "
                                  f"got {', '.join(sorted(description)) or 'nothing'}\nhint: python -m jobs verify")
    if description["model"] == "local-dir" or description["pretrained"] == "file":
        raise ValueError(f"{name} belongs to an encoder whose weights are in a file: expected where it is\n"
                         f"hint: --model and --pretrained as when it was embedded")
    return ClipConfig(description["model"], description["pretrained"], default.precision)


def read_tagged_weights(config: ClipConfig) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The weights of a model that open_clip knows by name, its architecture, and what its tag says."""
    if config.pretrained == RANDOM:
        return "", open_clip.get_model_config(check_model(config)), {}
    path = weights_path(config)
    if config.pretrained == "bundled":
        return path, json.loads((BUNDLED / f"{BUNDLED_MODEL}.json").read_text()), {}
    architecture = open_clip.get_model_config(check_model(config))
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not Path(path).is_file():
        try:
            if not tag:
                raise ValueError("no such tag")
            if tag.get("hf_hub"):
                repository, file = os.path.split(tag["hf_hub"])
                is_offered(f"{config.model} ({config.pretrained})", repository, (file,) if file else CLIP_FILES)
            path = open_clip.download_pretrained(tag)
        except Exception as error:
            if "\nhint: " in str(error):  # of the hub
                raise
            raise ValueError(f"open_clip has no weights {config.pretrained!r} for {config.model}, and there is no "
                             f"such file ({error})\nhint: --pretrained TAG or --pretrained /path/to/weights"
                             ) from error
    return path, architecture, tag


def read_own_weights(config: ClipConfig) -> tuple[str, dict[str, Any]]:
    """The weights of a model that lies in a folder or on a hub, and its open_clip_config.json."""
    if config.pretrained != "bundled":
        raise ValueError(f"{config.model} comes with its own weights, and --pretrained {config.pretrained} asks for "
                         f"others\nhint: --pretrained bundled")
    scheme, _, place = config.model.partition(":")
    if not place:
        raise ValueError(f"--model {config.model} names no model\nhint: {scheme}:"
                         f"{'/path/to/folder' if scheme == 'local-dir' else 'organisation/name'}")
    try:
        if scheme == "local-dir":
            # By open_clip's own choice among several: what is loaded is what is hashed.
            settings, path = Path(place) / _CONFIG, open_clip.factory._find_checkpoint_in_dir(Path(place))
        else:
            is_offered(config.model, place, (_CONFIG,), "the files of the model", flag="--model local-dir:FOLDER")
            settings, path = (Path(open_clip.pretrained.download_pretrained_from_hf(place, filename=name))
                              for name in (_CONFIG, None))
        document = json.loads(settings.read_text())
    except Exception as error:  # what a hub's client raises has no common type
        if "\nhint: " in str(error):
            raise
        hint = (f"a folder with {_CONFIG} and weights" if scheme == "local-dir" else "where there is no way to the "
                "hub, copy the model's files into a folder, and --model local-dir:FOLDER")
        raise ValueError(f"{config.model} cannot be read: {storage.first_line(error)}\nhint: {hint}"
                         ) from error
    if path is None:
        raise ValueError(f"{place} has no weights beside its {_CONFIG}\nhint: open_clip_model.safetensors, or any "
                         f"other *.safetensors, *.bin or *.pth")
    architecture = document.get("model_cfg") if isinstance(document, dict) else None
    if not isinstance(architecture, dict) or not architecture.keys() >= {"embed_dim", "vision_cfg", "text_cfg"}:
        raise ValueError(f"{_CONFIG} of {config.model} has no model_cfg with embed_dim, vision_cfg and text_cfg\n"
                         f"hint: open_clip's push_to_hf_hub writes such a file")
    return str(path), document


def check_model(config: ClipConfig) -> str:
    """The name of the model; ValueError if open_clip does not know it."""
    if config.model.startswith(OWN_WEIGHTS_SCHEMES):
        return config.model
    if config.model == BUNDLED_MODEL:
        open_clip.add_model_config(BUNDLED)
    if open_clip.get_model_config(config.model) is None:
        raise ValueError(f"open_clip knows no model {config.model!r}\nhint: `python -c 'import open_clip; "
                         f"print(open_clip.list_models())'` lists them")
    return config.model


def weights_path(config: ClipConfig) -> str:
    """The file or tag of the weights. ValueError if the model has no bundled weights."""
    if config.pretrained == "bundled":
        if config.model != BUNDLED_MODEL:
            raise ValueError(f"only {BUNDLED_MODEL} is bundled, not {config.model}\nhint: --pretrained TAG or FILE")
        if not _BUNDLED_WEIGHTS.is_file():
            raise FileNotFoundError(f"{_BUNDLED_WEIGHTS} is missing: the installation is incomplete\n"
                                    f"{INSTALL_AGAIN}")
        return str(_BUNDLED_WEIGHTS)
    return config.pretrained
