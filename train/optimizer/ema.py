"""Exponential moving average of the trained weights, in float32."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from opensora_fast.train.optimizer.master_adamw import MasterAdamW


class EMA:
    """average = decay · average + (1 - decay) · weight with every step of the optimizer, as Open-Sora 1.1.

    `MasterAdamW.step` moves the average in the same pass as the weights.

    Args:
        optimizer: whose masters are averaged; the average starts as a copy of them.
        decay: 0.9999 in Open-Sora.

    Attributes:
        flat: float32, like the optimizer's masters.
    """

    def __init__(self, optimizer: "MasterAdamW", decay: float) -> None:
        self.decay = decay
        self.flat = optimizer.master.clone()
        self._optimizer = optimizer

    @property
    def average(self) -> dict[str, Tensor]:
        """The average by parameter name; see `MasterAdamW.collect`."""
        return self._optimizer.collect(self.flat)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the average from a state dict that holds at least its names."""
        self._optimizer.fill(self.flat, state)
