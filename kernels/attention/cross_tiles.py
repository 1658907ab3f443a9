"""How cross-attention is cut into programs: chunks of a video's tokens, and one head of these and of the text."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from ..launch import ceil_divide

SHORTEST_CHUNK, LONGEST_CHUNK = 256, 8192
STEP = 64  # tokens that a program takes at a time as it walks over its chunk
AROUND = 1.5  # what a program takes before and behind its steps, in the time of one [counted, backward]


@lru_cache(maxsize=1024)
def chunk_length(runs: tuple[int, ...], programs: int, side_by_side: int, beside: float = 0.0) -> int:
    """Tokens of a chunk, in whole steps, such that all chunks should take the least time.

    Args:
        runs: the videos, as in `tables`.
        programs: of each chunk.
        side_by_side: programs that the GPU runs at a time.
        beside: what a chunk takes in other kernels, in the time of a step.
    """
    counts, lengths = runs[::2], runs[1::2]

    def time(tokens: int) -> float:
        chunks = sum(count * ceil_divide(length, tokens) for count, length in zip(counts, lengths, strict=True))
        return ceil_divide(chunks * programs, side_by_side) * (tokens / STEP + AROUND) + chunks * beside

    longest = min(max(ceil_divide(max(lengths), STEP) * STEP, SHORTEST_CHUNK), LONGEST_CHUNK)
    return min(range(longest, SHORTEST_CHUNK - 1, -STEP), key=time)


@triton.jit
def load_rows_and_text(tiles, kv, text_starts, text_lengths, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """What this program computes: one head of one tile (or chunk) of `tables.row_tiles`; heads run fastest.

    Args:
        tiles: int32 [tiles, 4].
        kv: [M, 2, H, D], contiguous.
        text_starts, text_lengths: int32 [B], of `layout.TextLayout`.

    Returns:
        (head, first token of the tile (int64), tokens of the video from there on, the first key of the video's text for
        this head, text tokens of the video). The values of the text lie H·D elements behind its keys.
    """
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    tile = tiles + program // HEADS * 4
    first = tl.load(tile + 2)
    first_token = tl.load(tile).to(tl.int64) + first
    rest = tl.load(tile + 1) - first
    video = tl.load(tile + 3)
    keys = kv + tl.load(text_starts + video).to(tl.int64) * (2 * HEADS * HEAD_SIZE) + head * HEAD_SIZE
    return head, first_token, rest, keys, tl.load(text_lengths + video)
