"""Many named tensors as views of one flat tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Each tensor begins at a multiple of so many elements: at least 128 bytes, which matrix products and kernels like.
ALIGNMENT = 64


class FlatLayout:
    """Where each of some named tensors lies in a flat one; between them lie zeros.

    Args:
        shapes: of the tensors, in order.

    Attributes:
        size: elements of the flat tensor.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = dict(shapes)
        self._padded = {name: -(-shape.numel() // ALIGNMENT) * ALIGNMENT for name, shape in self._shapes.items()}
        self.size = sum(self._padded.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors as views of `flat` [size]."""
        pieces = flat.split(list(self._padded.values()))
        return {
            name: piece[: shape.numel()].view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def gather(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor [size] with the values of the named tensors."""
        zeros = torch.zeros(ALIGNMENT, dtype=dtype, device=device)
        pieces = []
        for name, shape in self._shapes.items():
            pieces.append(tensors[name].detach().to(device, dtype).reshape(-1))
            if rest := self._padded[name] - shape.numel():
                pieces.append(zeros[:rest])
        return torch.cat(pieces)
