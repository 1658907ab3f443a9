"""Which rows a program of cross-attention has: tokens of one video, and one head of them and of the video's text."""

from __future__ import annotations

import triton
import triton.language as tl


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
