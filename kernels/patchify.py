"""Latent videos to the patches of a pack, and back.

A patch holds (channel, row in patch, column in patch), the order of a strided convolution's flattened weight; the
output tokens hold (row in patch, column in patch, channel), upstream's order. Height and width are zero-padded at the
bottom and right to a multiple of the patch; the output is cropped back.

Replaces in ST-DiT-2: the strided convolution's gather (`x_embedder`) and `unpatchify`.

Limits: plain PyTorch on purpose, for both together are 0.05 % of a training step's bytes (counted: benchmarks/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_tensor


def token_grid(frames: int, height: int, width: int, patch: int) -> tuple[int, int, int]:
    """(T, H, W) of a latent video in tokens."""
    return frames, -(-height // patch), -(-width // patch)


def patchify(batches: Sequence[Tensor], patch: int) -> Tensor:
    """Cuts latent videos into patches.

    Args:
        batches: batches of equal-shaped videos, each [videos, channels, T, height, width].
        patch: side of a patch in latent pixels.

    Returns:
        [N, channels·patch²], the videos one after another, tokens in (frame, row, column) order, in their dtype.

    Raises:
        ValueError: no batch, or one of another number of dimensions or channels.
    """
    if not batches:
        raise ValueError("patchify: no batch; give at least one, [videos, channels, T, height, width]")
    pieces, channels = [], None
    for x in batches:
        check_tensor("patchify", "a batch", x, (None, channels, None, None, None), None)
        _, channels, _, height, width = x.shape
        x = torch.nn.functional.pad(x, (0, -width % patch, 0, -height % patch))
        x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [b, c, t, h, ph, w, pw]
        pieces.append(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(0, 3))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def unpatchify(
    tokens: Tensor, batch_shapes: Sequence[tuple[int, int, int, int]], patch: int, channels: int
) -> list[Tensor]:
    """Puts patches back together.

    Args:
        tokens: [N, patch²·channels].
        batch_shapes: (videos, T, height, width) in latent pixels of each batch, in pack order.
        patch: side of a patch in latent pixels.
        channels: output channels.

    Returns:
        For each batch [videos, channels, T, height, width], in the dtype of the tokens.

    Raises:
        ValueError: tokens of another shape.
    """
    grids = [(videos, *token_grid(*shape, patch)) for videos, *shape in batch_shapes]
    check_tensor("unpatchify", "tokens", tokens, (sum(map(math.prod, grids)), patch**2 * channels), None)
    batches = []
    first = 0
    for grid, (*_, height, width) in zip(grids, batch_shapes, strict=True):
        last = first + math.prod(grid)
        x = tokens[first:last].view(*grid, patch, patch, channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # [b, c, t, h·ph, w·pw]
        batches.append(x[..., :height, :width])
        first = last
    return batches
