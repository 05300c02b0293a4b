"""Images to latents and back: diffusers' AutoencoderKL or VQModel in a folder, with the scale of its latents.

Letters: B images, H W their sides, C channels and h w sides of a latent, f = H / h.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KINDS = {"AutoencoderKL", "VQModel"}


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder whose latents a diffusion is trained on (Rombach et al. 2022, arXiv:2112.10752, section 3.1)."""

    network: Any
    kind: str
    """AutoencoderKL or VQModel."""
    scale: float
    """Factor that brings the variance of latents to about one. 0: unknown."""

    @property
    def channels(self) -> int:
        """C of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.network.parameters()).device

    @property
    def factor(self) -> int:
        """f: side of an image divided by the side of its latent."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of images (B, 3, H, W) in [-1, 1], not scaled.

        The deviation of a VQModel is zero: its latents are not yet rounded to codes. ValueError if the sides do not
        divide by f.
        """
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(f"images of {tuple(images.shape[-2:])}: sides must divide by {self.factor}")
        if self.kind == "VQModel":
            mean = self.network.encode(images).latents
            return mean, torch.zeros_like(mean)
        distribution = self.network.encode(images).latent_dist
        return distribution.mean, distribution.std

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: mean + std * noise (B, C, h, w)."""
        mean, std = self.moments(images)
        return self.scale * (mean if noise is None else mean + std * noise)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), about in [-1, 1]. A VQModel rounds latents to codes."""
        return self.network.decode(latents / self.scale).sample


def load(folder: str | Path, device: str | torch.device = "cpu", scale: float = 0.0) -> FirstStage:
    """The autoencoder in a folder as diffusers keeps it (config.json and weights), or of that name in the hub.

    scale: 0 uses the factor of its configuration, or 0 if it has none. ValueError if there is no autoencoder that can
    be used.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("first stages need the package diffusers\nhint: pip install diffusers") from error
    if Path(folder, "config.json").is_file():
        try:
            about = json.loads(Path(folder, "config.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder}/config.json is not JSON ({error})\nhint: was it edited or cut?") from error
    else:
        try:
            about = diffusers.AutoencoderKL.load_config(str(folder))
        except Exception as error:  # the client of a hub raises any type
            raise ValueError(f"there is no autoencoder in {folder}, and no such name in the hub can be read: "
                             f"{(str(error) or repr(error)).splitlines()[0]}\nhint: a folder with config.json and "
                             f"diffusion_pytorch_model.safetensors") from error
    kind = about.get("_class_name", "AutoencoderKL") if isinstance(about, dict) else type(about).__name__
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{folder} holds a {kind}\nhint: a first stage is one of {', '.join(sorted(_KINDS))}")
    try:
        network = getattr(diffusers, kind).from_pretrained(str(folder), use_safetensors=True)
    except Exception as error:
        raise ValueError(f"the autoencoder in {folder} cannot be loaded: "
                         f"{(str(error) or repr(error)).splitlines()[0]}") from error
    network = network.eval().requires_grad_(False).to(device)
    return FirstStage(network, kind, scale or float(about.get("scaling_factor") or 0.0))


def build(config: dict[str, Any], weights: dict[str, Tensor]) -> FirstStage:
    """The autoencoder of a configuration with its weights; ValueError if they do not fit each other."""
    import diffusers

    kind = config["_class_name"]
    network = getattr(diffusers, kind).from_config(config)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of this {kind}: {str(error).splitlines()[1].strip()}") from error
    return FirstStage(network.eval().requires_grad_(False), kind, float(config["scaling_factor"]))
