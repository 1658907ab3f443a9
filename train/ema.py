"""Exponential moving average of the trained weights, in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """average = decay * average + (1 - decay) * weight after every step, as Open-Sora 1.1.

    Args:
        masters: float32 weights by name; the average starts as a copy of them.
        decay: 0.9999 in Open-Sora.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Take one step towards the weights."""
        averages = list(self.average.values())
        weights = [masters[name].detach() for name in self.average]
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, weights, alpha=1 - self.decay)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the average from a state dict that holds at least its names."""
        for name, value in self.average.items():
            value.copy_(state[name])
