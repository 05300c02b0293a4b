"""The exponential moving average of the weights, which is what one samples from."""

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copy of a model's weights; young averages forget faster than `decay`."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights by one step."""
        self.updates += 1
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n))
        current = [weight.detach() for _, weight in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1.0 - decay)
