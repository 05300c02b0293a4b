"""The one door to open_clip: pictures and texts to unit vectors of one space.

It and torch are imported where they are used: that takes seconds, and most commands do without.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from pipeline import storage

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).parent / "tiny_clip"
BUNDLED_MODEL = "tiny-clip-64"
# What open_clip takes where a tag names nothing else: the values of the first CLIP models.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ClipConfig:
    """Which encoder makes the vectors."""

    model: str = "tiny-clip-64"
    """Name of an open_clip model."""
    pretrained: str = "bundled"
    """A pretrained tag of open_clip, a local file of weights, or `bundled` for the tiny CLIP in the package."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


@dataclass
class Encoder:
    """A loaded model with its own preprocessing."""

    dim: int
    prepare: Callable[[Image.Image], "torch.Tensor"]
    model: Any
    tokenizer: Any
    device: "torch.device"
    dtype: "torch.dtype"

    def images(self, pixels: "torch.Tensor") -> np.ndarray:
        """Unit vectors of preprocessed pictures: (B, 3, H, W) float32 -> (B, D) float32."""
        return self._unit(self.model.encode_image, pixels)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts: (B, D) float32."""
        return self._unit(self.model.encode_text, self.tokenizer(list(texts)))

    def _unit(self, encode: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor") -> np.ndarray:
        import torch
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            vectors = encode(batch.to(self.device, non_blocking=True)).float()
        # Normalised after the cast: in half precision the norm itself would be off by 1e-3.
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()


@lru_cache(maxsize=2)
def load(config: ClipConfig) -> Encoder:
    """The encoder of `config`, on the GPU if there is one; kept in this process.

    ValueError where open_clip knows no such model, or the weights do not fit it.
    """
    import open_clip
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
             "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}[config.precision]
    try:
        model, _, prepare = open_clip.create_model_and_transforms(_known(config), pretrained=_weights(config),
                                                                  device=device)
        tokenizer = open_clip.get_tokenizer(_known(config))
    except Exception as error:  # readers of weights raise whatever they like
        raise ValueError(f"open_clip cannot load {config.model} with the weights {config.pretrained}: "
                         f"{(str(error) or repr(error)).splitlines()[0]}\nhint: `python -c 'import open_clip; "
                         f"print(open_clip.list_pretrained())'` lists names and tags") from error
    model.eval().requires_grad_(False)
    dim = int(open_clip.get_model_config(_known(config))["embed_dim"])
    return Encoder(dim, prepare, model, tokenizer, device, dtype)


@lru_cache(maxsize=8)
def describe(config: ClipConfig) -> dict[str, Any]:
    """What makes vectors comparable: model, sha256 of the weights, preprocessing, normalisation.

    Loads no weights, so that a driver can plan; two encoders are the same if these are equal.
    """
    path, tag = _weights(config), {}
    if config.pretrained == "bundled":
        architecture = json.loads((BUNDLED / f"{BUNDLED_MODEL}.json").read_text())
    else:
        import open_clip
        architecture = open_clip.get_model_config(_known(config))
        tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
        if not Path(path).is_file():
            try:
                if not tag:
                    raise ValueError("no such tag")
                path = open_clip.download_pretrained(tag)
            except Exception as error:
                raise ValueError(f"open_clip has no weights {config.pretrained!r} for {config.model}, and there is no "
                                 f"such file ({error})\nhint: --pretrained TAG or --pretrained /path/to/weights"
                                 ) from error
    preprocessing = {"image_size": architecture["vision_cfg"]["image_size"],
                     "mean": list(tag.get("mean") or _MEAN), "std": list(tag.get("std") or _STD),
                     "interpolation": tag.get("interpolation") or "bicubic",
                     "resize": tag.get("resize_mode") or "shortest"}
    return {"model": config.model, "pretrained": config.pretrained if config.pretrained == "bundled"
            or tag else "file", "weights_sha256": storage.sha256_file(Path(path)),
            "architecture_sha256": hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest(),
            "dim": architecture["embed_dim"], "preprocessing": preprocessing, "normalised": True}


def batch(encoder: Encoder, pictures: Sequence[Image.Image]) -> "torch.Tensor":
    """Pictures preprocessed as the model wants them, (B, 3, H, W) float32."""
    import torch

    return torch.stack([encoder.prepare(picture) for picture in pictures])


def _known(config: ClipConfig) -> str:
    import open_clip
    if config.model == BUNDLED_MODEL:
        open_clip.add_model_config(BUNDLED)
    if open_clip.get_model_config(config.model) is None:
        raise ValueError(f"open_clip knows no model {config.model!r}\nhint: `python -c 'import open_clip; "
                         f"print(open_clip.list_models())'` lists them")
    return config.model


def _weights(config: ClipConfig) -> str:
    if config.pretrained == "bundled":
        if config.model != BUNDLED_MODEL:
            raise ValueError(f"only {BUNDLED_MODEL} is bundled, not {config.model}\nhint: --pretrained TAG or FILE")
        return str(BUNDLED / "tiny_clip.safetensors")
    return config.pretrained
