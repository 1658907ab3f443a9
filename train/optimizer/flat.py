"""Many named tensors as views of one flat tensor, of which several processes may hold a shard each."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Each tensor begins at a multiple of so many elements: at least 128 bytes, which matrix products and kernels like.
ALIGNMENT = 64


class FlatLayout:
    """Where each of some named tensors lies in a flat one; between them and behind them lie zeros.

    Args:
        shapes: of the tensors, in order.
        shards: the flat tensor can be cut into so many parts of one size, a multiple of `ALIGNMENT`.

    Attributes:
        shapes: as given.
        size: elements of the flat tensor.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], shards: int = 1) -> None:
        self.shapes = dict(shapes)
        self._padded = {name: -(-shape.numel() // ALIGNMENT) * ALIGNMENT for name, shape in self.shapes.items()}
        unpadded = sum(self._padded.values())
        self.size = -(-unpadded // (shards * ALIGNMENT)) * shards * ALIGNMENT
        self._padded[next(reversed(self._padded))] += self.size - unpadded

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors as views of `flat` [size]."""
        pieces = flat.split(list(self._padded.values()))
        return {
            name: piece[: shape.numel()].view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def gather(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor [size] with the values of the named tensors."""
        flat = torch.empty(self.size, dtype=dtype, device=device)
        sizes = [
            part for name, shape in self.shapes.items() for part in (shape.numel(), self._padded[name] - shape.numel())
        ]
        pieces = flat.split(sizes)
        values = [tensors[name].detach().to(device, dtype).reshape(-1) for name in self.shapes]
        # Many tensors in one launch, which `torch.cat` does, too, but at 1.35 TB/s on an H200.
        torch._foreach_copy_(list(pieces[::2]), values)
        if padding := [piece for piece in pieces[1::2] if piece.numel()]:
            torch._foreach_zero_(padding)
        return flat

    def fill(self, shard: Tensor, tensors: Mapping[str, Tensor], start: int = 0) -> None:
        """Copy into a part of a flat tensor, which begins at `start`, what lies in it of the named tensors."""
        stop = start + len(shard)
        begin = 0
        for name, shape in self.shapes.items():
            first, last = max(begin, start), min(begin + shape.numel(), stop)
            if first < last:
                values = tensors[name].detach().reshape(-1)[first - begin : last - begin]
                shard[first - start : last - start].copy_(values)
            begin += self._padded[name]
