"""The settings of a training run, and their form in JSON. Nothing here needs torch."""

import json
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from model.bounds import check_bounds

GROUPS = 32  # of the group norms


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet."""

    in_channels: Annotated[int, Ge(1)] = 3
    """Channels of the input: 3 for images, the channels of the first stage for latents."""
    out_channels: Annotated[int, Ge(1)] = 3
    """Channels of the output; as many as the input has."""
    model_channels: Annotated[int, Ge(GROUPS)] = 192
    """Width of the first level."""
    channel_mult: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 3, 5)
    """Width of each level, as a multiple of the first. One number for each level."""
    num_res_blocks: Annotated[int, Ge(1)] = 2
    """Residual blocks of each level."""
    attention_downsampling: tuple[Annotated[int, Ge(1)], ...] = (8, 4, 2)
    """Levels with attention, each by its downsampling factor after patches."""
    head_dim: Annotated[int, Ge(1)] = 32
    """Channels of an attention head."""
    depth: Annotated[int, Ge(1)] = 1
    """Transformer blocks of each attention layer."""
    context_dim: Annotated[int, Ge(1)] = 512
    """Length of a context vector: that of the CLIP embedding."""
    patch: Annotated[int, Ge(1)] = 1
    """Side in pixels of a patch. Each patch is one position of the network."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    learned_null: bool = False
    """Put a learned vector where the context has zeros: the null condition, and missing neighbors."""

    def __post_init__(self) -> None:
        check_bounds("train.unet", self)
        if self.model_channels % GROUPS or self.model_channels % self.head_dim:
            raise ValueError(f"train.unet.model_channels = {self.model_channels}: must divide by {GROUPS} (group norm) "
                             f"and by train.unet.head_dim = {self.head_dim}")

    @property
    def stride(self) -> int:
        """Height and width of an image must divide by this many pixels."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule and target. The square roots of the betas increase linearly.

    * "epsilon" is the prediction of the published checkpoints.
    * "x0" suits a network that is narrower than its patches: images fit through it, noise does not (Li and He 2025,
      arXiv:2511.13720).
    * "flow" is a straight line from the image to the noise (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022,
      arXiv:2210.02747). It ignores the betas.
    """

    timesteps: Annotated[int, Ge(1)] = 1000
    """Number of noise levels."""
    beta_start: Annotated[float, Interval(gt=0, lt=1)] = 0.0015
    """Variance of the noise that the first level adds."""
    beta_end: Annotated[float, Interval(gt=0, lt=1)] = 0.0195
    """Variance of the noise that the last level adds."""
    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """The target of the network: the noise, the velocity, the image, or the velocity of a flow."""
    min_snr: Annotated[float, Ge(0)] = 0.0
    """Weigh noise levels by their signal-to-noise ratio, up to this value (usually 5). 0: no weights."""

    def __post_init__(self) -> None:
        check_bounds("train.diffusion", self)
        if self.beta_start > self.beta_end:
            raise ValueError(f"train.diffusion.beta_start = {self.beta_start}: must be at most "
                             f"train.diffusion.beta_end = {self.beta_end}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Sizes of batches are for all processes together."""

    steps: Annotated[int, Ge(1)]
    """Updates of the weights."""
    global_batch: Annotated[int, Ge(1)]
    """Samples of one update, over all processes."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lr: Annotated[float, Interval(ge=0, lt=inf)] = 1e-4
    """Learning rate after the warm-up."""
    warmup: Annotated[int, Ge(0)] = 100
    """Steps in which the learning rate grows from zero."""
    weight_decay: Annotated[float, Interval(ge=0, lt=inf)] = 0.01
    """Weight decay of AdamW."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments of AdamW."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the gradient. 0 does not clip it."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """Decay rate of the averaged weights, for each step."""
    ema_more: tuple[Annotated[float, Interval(ge=0, lt=1)], ...] = ()
    """Rates of further averages."""
    p_uncond: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Share of the images that are trained without neighbors. Guidance needs this null condition."""
    k: Annotated[int, Ge(1)] = 4
    """Number of neighbors in the context of an image: the nearest ones."""
    random_k: bool = False
    """Use a random number of neighbors, from 1 to k, in each step."""
    p_drop_neighbor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Probability that a neighbor is replaced by zeros."""
    neighbor_noise: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Length of the Gaussian noise that is added to each neighbor's vector. The vector keeps its length."""
    own: Literal["none", "image", "caption"] = "none"
    """Put the vector of the image or of its caption before its neighbors. A prompt takes this place later."""
    image_size: Annotated[int, Ge(0)] = 0
    """Average images down to this many pixels a side before training. 0 keeps their size."""
    context_norm: Annotated[float, Interval(gt=0, lt=inf)] = 1.0
    """Length of the vectors that the network gets. The vectors of a database have length 1."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the batches, the noise and the first weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the products. auto: bf16 on a device that multiplies in it, otherwise fp32."""
    compile: bool = False
    """Compile the network with torch.compile, which takes minutes."""
    channels_last: bool = False
    """Keep the channels of a pixel together in memory. Convolutions on GPUs are faster with this layout."""
    fsdp: bool = False
    """Shard weights, averages and moments among the processes (FSDP2), for networks that do not fit one GPU."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Split the batch of each process into this many parts. This needs less memory and gives the same update."""
    checkpoint_every: Annotated[int, Ge(1)] = 10_000
    """Steps between checkpoints."""
    log_every: Annotated[int, Ge(1)] = 50
    """Steps between lines of metrics.jsonl."""
    validate_every: Annotated[int, Ge(0)] = 0
    """Steps between validations, if the run has a dataset for them. 0: at each checkpoint."""

    def __post_init__(self) -> None:
        check_bounds("train", self)
        if len({self.ema_decay, *self.ema_more}) <= len(self.ema_more):
            raise ValueError(f"train.ema_more = {self.ema_more}: must be different from each other and from "
                             f"train.ema_decay = {self.ema_decay}")
        if self.image_size % self.unet.stride:
            raise ValueError(f"train.image_size = {self.image_size}: must divide by {self.unet.stride}, or be 0")


# A resumed run may change these settings. They do not change what the network learns.
FREE_ON_RESUME = {"steps", "checkpoint_every", "log_every", "validate_every", "compile", "channels_last", "fsdp",
                  "accumulate", "unet.checkpointing"}


# Settings that were added later. Runs with their defaults keep the identity that they had before.
_LATER: dict[str, Any] = {"context_norm": 1.0, "image_size": 0, "ema_more": [], "random_k": False,
                          "p_drop_neighbor": 0.0, "neighbor_noise": 0.0, "own": "none",
                          "unet": {"learned_null": False}, "diffusion": {"min_snr": 0.0}}


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that identify a run, as plain JSON values, without those that a resumed run may change."""
    def settled(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
        return {name: settled(value, later.get(name, {})) if isinstance(value, dict) else value
                for name, value in values.items() if name not in later or value != later[name]}

    values = {name: value for name, value in to_dict(config).items() if name not in FREE_ON_RESUME}
    values["unet"]["checkpointing"] = False  # may change too, but the plans of older runs have it
    return settled(json.loads(json.dumps(values)), _LATER)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `to_dict` wrote, through JSON or not."""
    values = dict(values)
    unet, noise = dict(values.pop("unet")), values.pop("diffusion")
    for name in ("channel_mult", "attention_downsampling"):
        unet[name] = tuple(unet[name])
    for name in ("betas", "ema_more"):
        if name in values:
            values[name] = tuple(values[name])
    return TrainConfig(unet=UNetConfig(**unet), diffusion=DiffusionConfig(**noise), **values)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The changed settings that a resumed run must not change, as lines `name: old -> new`."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if name not in FREE_ON_RESUME and before[name] != after[name]
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
