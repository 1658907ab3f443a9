"""Host tables that tell attention programs which rows are theirs, built from sequence lengths and cached by them.

A pack's sequences (the frames of spatial attention, the videos of cross-attention) are described by runs: a flat list
count, length, count, length, … of consecutive sequences of equal length. Runs are host numbers, so a registered op can
take them as plain integers, and a table costs one small copy to the device the first time its shapes occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import place_table

NO_LIMIT = 2**31

_keepers: list[list[Tensor]] = []


@contextmanager
def keep_tables() -> Iterator[list[Tensor]]:
    """Yields a list that is filled with every table asked for within, by any thread.

    A CUDA graph reads tables at the addresses that they had when it was captured: whoever keeps the graph must keep
    them, since the caches here may forget them.
    """
    kept: list[Tensor] = []
    _keepers.append(kept)
    try:
        yield kept
    finally:
        # By identity: lists of equal contents are equal, and those of tensors cannot even be compared.
        _keepers[:] = [keeper for keeper in _keepers if keeper is not kept]


def _keep(table: Tensor) -> Tensor:
    for kept in _keepers:
        kept.append(table)
    return table


def row_tiles(
    runs: tuple[int, ...], rows: int, device: torch.device, shortest: int = 0, longest: int = NO_LIMIT
) -> Tensor:
    """Tiles of at most `rows` rows that cover the sequences whose length lies in [shortest, longest].

    Returns:
        int32 [tiles, 4] on `device`: first token of the sequence, its length, first row of the tile within it, and the
        sequence's number in the pack. Long sequences come first, so that the last programs to start are short ones.
    """
    return _keep(_row_tiles(runs, rows, device, shortest, longest))


def tile_ranges(runs: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Where each sequence's tiles lie in `row_tiles(runs, rows, device)`: int32 [sequences, 2], first and number."""
    return _keep(_tile_ranges(runs, rows, device))


@lru_cache(maxsize=1024)
def _row_tiles(runs: tuple[int, ...], rows: int, device: torch.device, shortest: int, longest: int) -> Tensor:
    lengths, first_tokens, chosen, tiles = _count_tiles(runs, rows, shortest, longest)
    sequence = chosen.repeat_interleave(tiles)
    first_row = (torch.arange(len(sequence), device="cpu") - (tiles.cumsum(0) - tiles).repeat_interleave(tiles)) * rows
    return place_table(torch.stack([first_tokens[sequence], lengths[sequence], first_row, sequence], dim=1), device)


@lru_cache(maxsize=1024)
def _tile_ranges(runs: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    lengths, _, chosen, tiles = _count_tiles(runs, rows, 0, NO_LIMIT)
    ranges = torch.empty(len(lengths), 2, dtype=torch.int64, device="cpu")
    ranges[chosen] = torch.stack([tiles.cumsum(0) - tiles, tiles], dim=1)
    return place_table(ranges, device)


def _count_tiles(
    runs: tuple[int, ...], rows: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lengths and first tokens of all sequences, those chosen in table order, the number of tiles of the chosen)."""
    counts, lengths = (torch.tensor(runs[part::2], device="cpu") for part in (0, 1))
    lengths = lengths.repeat_interleave(counts)
    first_tokens = lengths.cumsum(0) - lengths
    chosen = ((lengths >= shortest) & (lengths <= longest)).nonzero().squeeze(1)
    chosen = chosen[torch.argsort(lengths[chosen], descending=True, stable=True)]
    return lengths, first_tokens, chosen, (lengths[chosen] + rows - 1) // rows
