"""Checkpoints of the CompVis release (`model.ckpt`) as networks of this project, by name and shape.

torch's reader of weights reads the file and runs no code in it. Other pickled objects, such as the settings of a
trainer, become objects that do nothing. Blattmann et al. 2022, arXiv:2204.11824; Rombach et al. 2022, arXiv:2112.10752
and arXiv:2207.13038.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from model.config import DiffusionConfig, UNetConfig

_UNET, _EMA, _FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
_SCHEDULE = re.compile(r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_alphas_cumprod|"
                       r"posterior_\w+|lvlb_weights|logvar|scale_factor)")
# Parts that sampling does not need: losses of a first stage, the CLIP of the retrieval, conditioning stages without
# weights.
_NOT_DRAWING = re.compile(r"(first_stage_model\.loss\.|first_stage_model\.model_ema\.|cond_stage_model\.|retriever\.|"
                          r"loss\.|model_ema\.(decay|num_updates)$)")


@dataclass
class Released:
    """The content of a published checkpoint."""

    unet: dict[str, Tensor]
    """Under the names of `model.unet.UNet`; the moving average where there is one."""
    first_stage: dict[str, Tensor]
    """Under the names of CompVis's autoencoders; empty if there is none."""
    diffusion: DiffusionConfig
    averaged: bool
    """Whether the weights of the UNet are the moving average."""
    scale: float | None
    """The factor of the latents, if the checkpoint has it."""
    step: int = 0
    left_out: list[str] = field(default_factory=list)
    """Names of known tensors that were ignored."""


def read(path: Path) -> Released:
    """The networks of a `model.ckpt` or of a safetensors file with the same names.

    ValueError if the file is not a checkpoint, or has an unknown name.
    """
    values, step = _tensors(path)
    released = Released({}, {}, DiffusionConfig(), averaged=False, scale=None, step=step)
    average, unknown = {}, []
    for name, tensor in values.items():
        if _NOT_DRAWING.match(name):
            released.left_out.append(name)
        elif name.startswith(_UNET):
            released.unet[name.removeprefix(_UNET)] = tensor
        elif name.startswith(_EMA):
            average[name.removeprefix(_EMA)] = tensor
        elif name.startswith(_FIRST_STAGE):
            released.first_stage[name.removeprefix(_FIRST_STAGE)] = tensor
        elif _SCHEDULE.fullmatch(name):
            released.left_out.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} names that no released model has: {', '.join(unknown[:4])}\n"
                         f"hint: this reads checkpoints of CompVis's latent diffusion and RDM")
    if not released.unet:
        raise ValueError(f"{path} has no weights of a UNet ({_UNET}*)\nhint: this reads checkpoints of CompVis's "
                         f"latent diffusion and RDM")
    if average:
        released.unet, released.averaged = _averaged_weights(path, released.unet, average), True
    if "betas" in values:
        released.diffusion = _diffusion_config(path, values["betas"])
    if "scale_factor" in values:
        if values["scale_factor"].numel() != 1:
            raise ValueError(f"{path}: its scale_factor is not one number")
        released.scale = float(values["scale_factor"])
    return released


def _tensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """Each tensor by name, and the step of the checkpoint."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path), 0
        # A trainer pickles its callbacks: their classes are replaced by one that does nothing.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_inert_class(name), name) for name in names]):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # readers of weights raise any type
        raise ValueError(f"{path} cannot be read as weights: {(str(error) or repr(error)).splitlines()[0]}\n"
                         f"hint: a checkpoint as torch.save writes it since version 1.6, or safetensors") from error
    step = loaded.get("global_step", 0) if isinstance(loaded, Mapping) else 0
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    if not isinstance(loaded, Mapping):
        loaded = {}
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights\nhint: is it a checkpoint?")
    return tensors, step if isinstance(step, int) else 0


def _inert_class(name: str) -> type:
    """A class that accepts all arguments and keeps nothing."""
    class Inert:
        def __new__(cls, *_: Any, **__: Any) -> Self:
            return object.__new__(cls)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    Inert.__name__ = name.rpartition(".")[2]
    return Inert


def _averaged_weights(path: Path, unet: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The moving average under the names of the UNet. The checkpoint spells these names without dots."""
    weights = {}
    for name in unet:
        for flat in (f"diffusion_model.{name}".replace(".", ""), name.replace(".", "")):
            if flat in average:
                weights[name] = average.pop(flat)
                break
        else:
            raise ValueError(f"{path}: the moving average lacks {name}\nhint: is the file whole?")
    if average:
        raise ValueError(f"{path}: the moving average has names that the UNet has not: "
                         f"{', '.join(sorted(average)[:4])}")
    return weights


def _diffusion_config(path: Path, betas: Tensor) -> DiffusionConfig:
    if betas.ndim != 1 or not len(betas) or not betas.is_floating_point():
        raise ValueError(f"{path}: its betas are not a list of numbers")
    try:
        config = DiffusionConfig(timesteps=len(betas), beta_start=round(float(betas[0]), 7),
                                 beta_end=round(float(betas[-1]), 7))
    except ValueError as error:
        raise ValueError(f"{path}: its betas make no noise schedule: {error}") from error
    root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    if (root**2 - betas.double()).abs().max() > 1e-6:
        raise ValueError(f"{path}: its betas are not the squares of a linear ramp between square roots")
    return config


def unet_config(weights: Mapping[str, Tensor], head_dim: int = 32) -> UNetConfig:
    """The sizes of the UNet with these weights. The weights do not tell the width of a head.

    Raises ValueError if they are those of no such UNet.
    """
    try:
        first, last = weights["input_blocks.0.0.weight"], weights["out.2.weight"]
        width, blocks, level = first.shape[0], 0, 0
        mults: list[int] = []
        attention: list[int] = []
        last_block = max(int(name.split(".")[1]) for name in weights if name.startswith("input_blocks."))
        for number in range(1, last_block + 1):
            start = f"input_blocks.{number}."
            if f"{start}0.op.weight" in weights:
                level += 1
                continue
            blocks += level == 0
            channels = weights[f"{start}0.out_layers.3.weight"].shape[0]
            if len(mults) == level:
                mults.append(channels // width)
            if f"{start}1.proj_in.weight" in weights and 2**level not in attention:
                attention.append(2**level)
        middle = "middle_block.1.transformer_blocks."
        return UNetConfig(
            in_channels=first.shape[1], out_channels=last.shape[0], model_channels=width, channel_mult=tuple(mults),
            num_res_blocks=blocks, attention_downsampling=tuple(reversed(attention)), head_dim=head_dim,
            depth=1 + max(int(name.removeprefix(middle).split(".")[0]) for name in weights if name.startswith(middle)),
            context_dim=weights[f"{middle}0.attn2.to_k.weight"].shape[1])
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these are not the weights of a UNet of the release: {error}") from None


def first_stage_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of diffusers' AutoencoderKL or VQModel for these weights of CompVis.

    Raises ValueError if they are those of neither.
    """
    try:
        levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))
        widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        attended = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
        blocks = 1 + max(int(name.split(".")[4]) for name in weights if name.startswith("encoder.down.0.block."))
        latent = weights["decoder.conv_in.weight"].shape[1]
        embedded = weights["post_quant_conv.weight"].shape[1]
        vq = "quantize.embedding.weight" in weights
        if weights["encoder.conv_out.weight"].shape[0] != latent * (1 if vq else 2) or (embedded != latent and not vq):
            raise ValueError("its latents have as many channels as neither an AutoencoderKL nor a VQModel gives them")
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these are not the weights of a first stage of the release: {error}") from None
    sizes = {"in_channels": weights["encoder.conv_in.weight"].shape[1],
             "out_channels": weights["decoder.conv_out.weight"].shape[0], "block_out_channels": widths,
             "layers_per_block": blocks, "latent_channels": latent, "norm_num_groups": 32, "act_fn": "silu",
             "down_block_types": [f"{'Attn' if attends else ''}DownEncoderBlock2D" for attends in attended],
             "up_block_types": [f"{'Attn' if attends else ''}UpDecoderBlock2D" for attends in reversed(attended)]}
    if vq:
        codes, dim = weights["quantize.embedding.weight"].shape
        return sizes | {"_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": dim,
                        "scaling_factor": 1.0}
    return sizes | {"_class_name": "AutoencoderKL", "scaling_factor": 1.0}


_IN_A_BLOCK = {"nin_shortcut": "conv_shortcut"}
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def first_stage_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of CompVis's first stage under the names of diffusers, 1x1 convolutions of attention as matrices."""
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))
    renamed = {}
    for name, tensor in weights.items():
        new = _new_name(name, levels)
        if tensor.ndim == 4 and re.search(r"\.to_(q|k|v|out\.0)\.weight$", new):
            tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed


def _new_name(name: str, levels: int) -> str:
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match:
        half, way, level, kind, number, part, what = match.groups()
        place = int(level) if way == "down" else levels - 1 - int(level)  # CompVis counts from the image outwards
        part = (_IN_A_BLOCK if kind == "block" else _IN_ATTENTION).get(part, part)
        return f"{half}.{way}_blocks.{place}.{'resnets' if kind == 'block' else 'attentions'}.{number}.{part}.{what}"
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(down|up)sample\.conv\.(weight|bias)", name)
    if match:
        half, way, level, _, what = match.groups()
        place = int(level) if way == "down" else levels - 1 - int(level)
        return f"{half}.{way}_blocks.{place}.{way}samplers.0.conv.{what}"
    match = re.fullmatch(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(\w+)\.(weight|bias)", name)
    if match:
        half, kind, number, part, what = match.groups()
        part = (_IN_A_BLOCK if kind == "block" else _IN_ATTENTION).get(part, part)
        return f"{half}.mid_block.{'resnets' if kind == 'block' else 'attentions'}.{int(number) - 1}.{part}.{what}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
