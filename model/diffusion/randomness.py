"""Random numbers that belong to an image, not to a process.

Each number comes from its own generator on the CPU, seeded by (seed, purpose, step, position in the
global batch). So the numbers do not depend on the number of processes, the device or interruptions.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, step: int, position: int) -> torch.Generator:
    """A CPU generator for one purpose of one image in one step."""
    key = f"{seed}/{purpose}/{step}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    # manual_seed takes 64 bits, but a sign bit would be read differently by different versions.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(seed: int, purpose: str, step: int, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise for these positions: (B, *shape) float32."""
    draws = [torch.randn(*shape, generator=generator(seed, purpose, step, i)) for i in positions]
    return torch.stack(draws)


def timesteps(seed: int, step: int, positions: Iterable[int], count: int) -> Tensor:
    """A uniform noise level in 0..count-1 for these positions: (B,) int64."""
    draws = [torch.randint(count, (), generator=generator(seed, "timestep", step, i)) for i in positions]
    return torch.stack(draws)


def dropout_mask(seed: int, step: int, positions: Iterable[int], probability: float) -> Tensor:
    """The positions whose condition is dropped in this step: (B,) bool."""
    draws = [torch.rand((), generator=generator(seed, "dropout", step, i)) for i in positions]
    return torch.stack(draws) < probability


def uniform(seed: int, purpose: str, step: int, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) for these positions: (B, *shape) float32."""
    return torch.stack([torch.rand(*shape, generator=generator(seed, purpose, step, i)) for i in positions])


def shared_integer(seed: int, purpose: str, step: int, least: int, most: int) -> int:
    """An integer in least..most, the same for all positions of a step."""
    return int(torch.randint(least, most + 1, (), generator=generator(seed, purpose, step, -1)))
