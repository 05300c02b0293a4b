"""What a training run is: its settings, and their form in JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from model.diffusion import DiffusionConfig
from model.unet import UNetConfig


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; batches are counted over all processes, times in steps."""

    steps: int
    global_batch: int
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lr: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema_decay: float = 0.9999
    p_uncond: float = 0.1
    """How often a picture is trained without its neighbours, so that guidance has an anchor."""
    k: int = 4
    """Context vectors a picture is trained with: the first k of those in the batch."""
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    checkpoint_every: int = 10_000
    log_every: int = 50

    def __post_init__(self):
        for name in ("steps", "global_batch", "k", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not 0.0 <= self.p_uncond <= 1.0:
            raise ValueError(f"p_uncond = {self.p_uncond}: must be within [0, 1]")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision = {self.precision!r}: must be auto, fp32 or bf16")


# What a resumed run may change: how long, how fast and how often, never what is learned.
FREE_ON_RESUME = {"steps", "checkpoint_every", "log_every", "compile", "unet.checkpointing"}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `to_dict` wrote, through JSON or not."""
    values = dict(values)
    unet, noise = dict(values.pop("unet")), values.pop("diffusion")
    for name in ("channel_mult", "attention_downsampling"):
        unet[name] = tuple(unet[name])
    values["betas"] = tuple(values["betas"])
    return TrainConfig(unet=UNetConfig(**unet), diffusion=DiffusionConfig(**noise), **values)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Settings a resumed run may not change but does, as lines `name: old -> new`."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if name not in FREE_ON_RESUME and before[name] != after[name]
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
