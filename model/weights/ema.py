"""Exponential moving averages of the weights. Sampling uses them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of a model's weights, one for each rate. After few updates an average forgets faster."""

    def __init__(self, model: nn.Module, decay: float, more: Sequence[float] = ()):
        self.decay = decay
        self.updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {
            rate: {name: weight.detach().clone() for name, weight in model.named_parameters()}
            for rate in (decay, *more)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average of the first rate."""
        return self.averages[self.decay]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's weights by one step."""
        self.updates += 1
        n = self.updates
        current = [weight.detach() for _, weight in model.named_parameters()]
        for rate, weights in self.averages.items():
            torch._foreach_lerp_(list(weights.values()), current, 1.0 - min(rate, (1 + n) / (10 + n)))
