"""Floating-point operations of a network, counted by torch on tensors without data."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from model.config import TrainConfig, UNetConfig

if TYPE_CHECKING:
    from model.network.unet import UNet


@dataclass(frozen=True)
class Size:
    """Operations of one forward pass of one image or latent, and the number of parameters."""

    forward: float
    """A multiplication and an addition are two."""
    parameters: int

    def training(self, checkpointing: bool) -> float:
        """Operations of an update for one image. Backward costs twice forward; checkpointing repeats forward."""
        return (4 if checkpointing else 3) * self.forward


# Peak bfloat16 operations a second, without sparsity, from the data sheets; longer names first.
_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
          "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12}


def peak(device: str) -> float | None:
    """Operations a second that a GPU of this name can do in bfloat16; None for one that is not known.

    A MIG slice such as "NVIDIA H100 80GB HBM3 MIG 1g.10gb" has one seventh of the GPU.
    """
    rate = next((rate for name, rate in _PEAKS.items() if name in device), None)
    sevenths = re.search(r"MIG (\d)g\.", device)
    return rate * int(sevenths[1]) / 7 if rate and sevenths else rate


@lru_cache(maxsize=8)
def size(config: UNetConfig, side: int, k: int) -> Size:
    """The size of a network for inputs of `side` x `side` with k context vectors.

    It counts convolutions and matrix products, attention included. The rest is small.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        network = _network(config)
        inputs = (torch.empty(1, config.in_channels, side, side), torch.zeros(1),
                  torch.empty(1, k, config.context_dim))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(*inputs)
    return Size(float(counter.get_total_flops()), count_parameters(config))


@lru_cache(maxsize=16)
def count_parameters(config: UNetConfig) -> int:
    """The parameters of a network."""
    return sum(parameter.numel() for parameter in _network(config).parameters())


def training_bytes(config: TrainConfig) -> int:
    """Bytes of float32 weights, gradients, two moments and averages in a process of a run. Without activations."""
    return count_parameters(config.unet) * 4 * (1 + 1 + 2 + 1 + len(config.ema_more))


def _network(config: UNetConfig) -> "UNet":
    """A network whose tensors take no memory."""
    import torch

    from model.network.unet import UNet
    with torch.device("meta"):
        return UNet(config).eval()
