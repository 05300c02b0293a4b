"""What a network costs: floating point operations, counted by torch on tensors without data."""

import re
from dataclasses import dataclass
from functools import lru_cache

from model.config import UNetConfig


@dataclass(frozen=True)
class Size:
    """Operations of one pass over one picture or latent, and how many parameters there are."""

    forward: float
    """A multiplication and an addition are two."""
    parameters: int

    def training(self, checkpointing: bool) -> float:
        """Operations of an update for one picture: backwards is twice forwards; checkpointing goes forwards again."""
        return (4 if checkpointing else 3) * self.forward


# Products of bfloat16 matrices a second, without sparsity, as the makers' data sheets have them; longer names first.
_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
          "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12}


def peak(device: str) -> float | None:
    """Operations a second that a GPU of this name can do in bfloat16; None for one that is not known.

    A MIG slice such as "NVIDIA H100 80GB HBM3 MIG 1g.10gb" has so many sevenths of the GPU.
    """
    rate = next((rate for name, rate in _PEAKS.items() if name in device), None)
    sevenths = re.search(r"MIG (\d)g\.", device)
    return rate * int(sevenths[1]) / 7 if rate and sevenths else rate


@lru_cache(maxsize=8)
def size(config: UNetConfig, side: int, k: int) -> Size:
    """The size of a network for inputs of `side` x `side` with k context vectors.

    Convolutions and products of matrices, attention included; the rest is little, and not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model.network.unet import UNet
    with torch.device("meta"):
        network = UNet(config).eval()
        inputs = (torch.empty(1, config.in_channels, side, side), torch.zeros(1),
                  torch.empty(1, k, config.context_dim))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(*inputs)
    return Size(float(counter.get_total_flops()), sum(parameter.numel() for parameter in network.parameters()))
