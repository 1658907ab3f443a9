"""FlexAttention on packs: the block mask of sequences one after another, built on the host from their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..measuring.provider import compiled
from .attention_work import Attend

BLOCK = 128  # FlexAttention's own default


def block_mask_of(q_lengths: Sequence[int], k_lengths: Sequence[int], device: torch.device):
    """The `BlockMask` in which the queries of a sequence attend to its keys.

    Args:
        q_lengths, k_lengths: of each sequence; the tokens lie one sequence after another.
    """
    from torch.nn.attention.flex_attention import BlockMask

    q_starts, k_starts = [0, *accumulate(q_lengths)], [0, *accumulate(k_lengths)]
    q_owner, k_owner = (
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in (q_lengths, k_lengths)
    )
    rows, columns = -(-q_starts[-1] // BLOCK), -(-k_starts[-1] // BLOCK)
    partial: list[list[int]] = []
    full: list[list[int]] = []
    for row in range(rows):
        last_query = min((row + 1) * BLOCK, q_starts[-1]) - 1
        first, last = int(q_owner[row * BLOCK]), int(q_owner[last_query])
        begin, end = k_starts[first], k_starts[last + 1]
        blocks = range(begin // BLOCK, -(-end // BLOCK)) if end > begin else range(0)
        # A block counts as full where all its queries and keys exist and belong to one sequence.
        is_whole = first == last and last_query % BLOCK == BLOCK - 1
        inside = {block for block in blocks if is_whole and begin <= block * BLOCK and (block + 1) * BLOCK <= end}
        full.append(sorted(inside))
        partial.append([block for block in blocks if block not in inside])

    def tables(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([[[len(blocks) for blocks in lists]]], dtype=torch.int32, device=device)
        # Every row lists all blocks, those that count first, as BlockMask expects.
        padded = [blocks + sorted(set(range(columns)).difference(blocks)) for blocks in lists]
        return counts, torch.tensor([[padded]], dtype=torch.int32, device=device)

    q_owner, k_owner = q_owner.to(device), k_owner.to(device)

    def same_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return q_owner[query] == k_owner[key]

    return BlockMask.from_kv_blocks(
        *tables(partial),
        *tables(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_sequence,
        seq_lengths=(q_starts[-1], k_starts[-1]),
    )


def flex_attention_of(pack: tuple[Sequence[int], Sequence[int], torch.device] | None) -> Attend:
    """Compiled FlexAttention: dense, or with the block mask of (lengths of q, lengths of k, device)."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = None if pack is None else block_mask_of(*pack)
    call = compiled(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, block_mask=mask)

    return attend
