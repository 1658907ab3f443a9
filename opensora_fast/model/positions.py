"""Where a token lies in its frame: the embedding of its row and column, scaled to the size of the video in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.layout import makes_stand_ins

Scale = float | Tensor


def position_scales(height: Tensor, width: Tensor, input_sq_size: int) -> list[Scale]:
    """sqrt(height · width) / input_sq_size of each video, of sizes [B] in pixels; tensors when only the GPU knows
    them."""
    scales = (height.double() * width.double()).sqrt() / input_sq_size
    return scales.tolist() if scales.device.type == "cpu" else list(scales.unbind())


def add_positions(x: Tensor, scales: Sequence[Scale], layout: PackLayout, rounded_to: torch.dtype) -> Tensor:
    """Adds to each token of x [N, C] the embedding of its row and column.

    Args:
        scales: of each video, see `position_embedding`, as is `rounded_to`.
    """
    groups: list[tuple[tuple[int, int, int], Scale, int]] = []  # consecutive videos of one embedding
    for shape, scale in zip(layout.shapes, scales, strict=True):
        if groups and groups[-1][0] == shape and (groups[-1][1] is scale or _same_number(groups[-1][1], scale)):
            groups[-1] = (shape, scale, groups[-1][2] + 1)
        else:
            groups.append((shape, scale, 1))
    pieces = []
    first = 0
    for (frames, height, width), scale, videos in groups:
        position = position_embedding(height, width, scale, x.shape[1], layout.device, rounded_to).to(x.dtype)
        last = first + videos * frames * height * width
        pieces.append((x[first:last].view(-1, height * width, x.shape[1]) + position).flatten(0, 1))
        first = last
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def position_embedding(
    height: int,
    width: int,
    scale: float | Tensor,
    channels: int,
    device: torch.device,
    rounded_to: torch.dtype = torch.float32,
) -> Tensor:
    """2-D sine-cosine position embedding of one frame.

    The first half of the channels encodes the column, the second half the row; each is `[sin, cos]` of C/4 frequencies
    10000^(-2i/(C/2)). The coordinate of column j is j / scale · base / width with base = round(sqrt(S)), likewise rows.

    Args:
        height, width: of the frame in tokens.
        scale: sqrt(height · width in pixels) / input_sq_size; a scalar tensor on the GPU is not read by the host.
        channels: C.
        device: where the result is put.
        rounded_to: the frequencies are rounded to it; upstream's are a buffer that takes the dtype of the model.

    Returns:
        float32 [S, C].
    """
    base = round((height * width) ** 0.5)
    encode = encode_side if isinstance(scale, Tensor) or makes_stand_ins() else cached_side
    columns = encode(width, base, scale, channels, device, rounded_to)[None].expand(height, -1, -1)
    rows = encode(height, base, scale, channels, device, rounded_to)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def encode_side(
    length: int, base: int, scale: float | Tensor, channels: int, device: torch.device, rounded_to: torch.dtype
) -> Tensor:
    """float32 [length, C/2] of the coordinates along one side of a frame, see `position_embedding`."""
    exponents = torch.arange(0, channels // 2, 2, device=device).float() / (channels // 2)
    frequencies = (1.0 / (10000**exponents)).to(rounded_to).float()
    coordinates = torch.arange(length, device=device, dtype=torch.float32) / scale * (base / length)
    angles = coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# The sizes of buckets come again every step. Sides are kept, not frames: a frame of 720p takes 17 MB, its sides 0.3.
cached_side = lru_cache(maxsize=256)(encode_side)


def _same_number(first: float | Tensor, second: float | Tensor) -> bool:
    return isinstance(first, float) and isinstance(second, float) and first == second
