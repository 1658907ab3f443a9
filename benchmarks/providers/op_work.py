"""What the inputs of the ops have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor


class OpWork:
    """Inputs of an op; a dataclass with a field `leaves`: those that get a gradient, by the op's argument names."""

    leaves: dict[str, Tensor]

    @property
    def device(self) -> str:
        return next(iter(self.leaves.values())).device.type

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    def to(self, dtype: torch.dtype) -> Self:
        """The same values in another dtype, as fresh leaves."""
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves)
