"""Attention within many sequences by PyTorch, in as many calls as its kernels need: for the references of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the float32 sum in the backward pass of PyTorch's flash attention, lengths and head sizes rounded up; with
# more it writes elsewhere ("an illegal memory access", torch 2.11), and nothing runs on the GPU any more. See
# https://github.com/Dao-AILab/flash-attention/pull/1500.
FLASH_ELEMENTS, FLASH_ROWS, FLASH_COLUMNS = 2**31, 128, 32
# Sequences of one launch: the y and z of a CUDA grid end there.
MOST_SEQUENCES = 65535


def count_flash_elements(sequences: int, heads: int, length: int, head_size: int) -> int:
    """Elements of that sum."""
    rows, columns = (-(-size // unit) * unit for size, unit in ((length, FLASH_ROWS), (head_size, FLASH_COLUMNS)))
    return sequences * heads * rows * columns


def attend_sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q · kᵀ / sqrt(D)) · v within each sequence and head, on a GPU with any number of sequences.

    Temporal attention of an image has as many as the image has tokens.

    Args:
        q: [sequences, H, L, D].
        k, v: [sequences, H, M, D].

    Returns:
        [sequences, H, L, D].
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    most = max(1, min(MOST_SEQUENCES, FLASH_ELEMENTS // count_flash_elements(1, *q.shape[1:])))
    if q.shape[0] <= most:
        return attend(q, k, v)
    return torch.cat([attend(*part) for part in zip(*(z.split(most) for z in (q, k, v)), strict=True)])
