"""Pieces shared by the kernels of temporal attention: which rows a program has, and the way from raw rows and back.

Letters: D head size, m rows of a tile, T frames, S tokens of a frame, W = q_weight · k_weight. A head tile [m, D] is a
pair, see attention_tiles; the rows of `layout.place_tiles` and `layout.place_blocks` say what a program computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_tiles import load_head, load_weight_product, to_float32
from .rotary_tiles import (
    join_columns,
    load_angles,
    reciprocal_rms_apart,
    rotate,
    rotate_back,
    scale_rows_apart,
    split_columns,
    subtract_along,
)

# The builds of kernels for blocks.
COMPILED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def block_class(dtype: torch.dtype) -> str:
    """Class of the configurations of kernels for blocks: float32 multiplies outside the matrix units, unlike others."""
    return "float32" if dtype == torch.float32 else "half"


@triton.jit
def place_rows(tile, ROWS: tl.constexpr, AGAIN: tl.constexpr = False):
    """The rows of a tile of `layout.place_tiles`, each [ROWS]. AGAIN is as in `load_weight_product`.

    Returns:
        token, frame within its video, place within the tile, whether the row holds a token, and whether that token has
        others to attend to (T > 1).
    """
    HINT: tl.constexpr = ".ca" if AGAIN else ""
    first_token = tl.load(tile, cache_modifier=HINT)
    frames = tl.load(tile + 1, cache_modifier=HINT)
    frame_tokens = tl.load(tile + 2, cache_modifier=HINT)
    places = tl.load(tile + 3, cache_modifier=HINT)
    row = tl.arange(0, ROWS)
    # row // frames: a division for each row would cost as much as the softmax. Exact, as row and frames are below 256.
    place = row * ((65535 + frames) // frames) >> 16
    frame = row - place * frames
    token = (first_token + frame * frame_tokens + place).to(tl.int64)
    inside = place < places
    return token, frame, place, inside, inside & (frames > 1)


@triton.jit
def load_block(block):
    """A row of `layout.place_blocks`: token of the first frame at the place, T, S, first frame of the block."""
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)


@triton.jit
def block_rows(first_token, frames, frame_tokens, start, ROWS: tl.constexpr):
    """Frames start … start + ROWS of one place of a long video: token, frame and whether there is one, each [ROWS]."""
    rows = start + tl.arange(0, ROWS)
    inside = rows < frames
    frame = tl.minimum(rows, frames - 1)
    return (first_token + frame * frame_tokens).to(tl.int64), frame, inside


@triton.jit
def normed_rows(head, cos, sin, eps, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Rotated and, with NORM, RMS-normed rows: float32 head tile [m, D], and the reciprocal RMS [m] (ones without)."""
    head = to_float32(head)
    if NORM:
        reciprocal = reciprocal_rms_apart(head, eps, HEAD_SIZE)  # rotation keeps lengths
        return rotate(scale_rows_apart(head, reciprocal), cos, sin), reciprocal
    else:
        # Times one, for the seam of `scale_rows_apart`: without it the compiler rotates rows where the matrix product
        # wants them, and spills up to 888 bytes on sm_80.
        ones = tl.full([head[0].shape[0]], 1.0, tl.float32)
        return rotate(scale_rows_apart(head, ones), cos, sin), ones


@triton.jit
def load_normed(
    pointer,
    cos,
    sin,
    token,
    frame,
    inside,
    eps,
    NORM: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """`normed_rows` of the given tokens; `pointer` points to the head's first column in token 0."""
    head = load_head(pointer, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    cosines = load_angles(cos, frame, HEAD_SIZE)
    sines = load_angles(sin, frame, HEAD_SIZE)
    return normed_rows(head, cosines, sines, eps, NORM, HEAD_SIZE)


@triton.jit
def query_factors(q_weight, k_weight, SCALE: tl.constexpr, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """What a normed query is multiplied with: SCALE · q_weight · k_weight, or SCALE alone; a pair that broadcasts."""
    if NORM:
        weight = load_weight_product(q_weight, k_weight, HEAD_SIZE)
        return weight[0] * SCALE, weight[1] * SCALE
    else:
        return tl.full([1, 1], SCALE, tl.float32), tl.full([1, 1], SCALE, tl.float32)


@triton.jit
def _finish_part(gradient, raw, cos, sin, factors):
    """One of the tiles of `finish_queries`."""
    even, odd = split_columns(gradient)
    raw_even, raw_odd = split_columns(raw)
    products = join_columns((raw_even * cos - raw_odd * sin) * even, (raw_odd * cos + raw_even * sin) * odd)
    column_sums = tl.sum(products, axis=0)  # before the rest, so that the products do not stay in registers
    factors_even, factors_odd = split_columns(tl.broadcast_to(factors, [1, gradient.shape[1]]))
    even *= factors_even
    odd *= factors_odd
    return column_sums, join_columns(even * cos + odd * sin, odd * cos - even * sin)


@triton.jit
def finish_queries(gradient, raw, cos, sin, factors, reciprocal, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """From dS · k̂ to the gradient of the raw queries.

    Args:
        gradient: dS · k̂, float32 head tile [m, D].
        raw: queries as qkv has them, float32 head tile [m, D].
        factors: W / sqrt(D), a pair that broadcasts.
        reciprocal: reciprocal RMS of the queries [m].

    Returns:
        the sums over rows of (dS · k̂) · q̂, a pair of vectors, and dq as float32 head tile [m, D].
    """
    if NORM:
        gradient = scale_rows_apart(gradient, reciprocal)
    wide_sums, wide = _finish_part(gradient[0], raw[0], cos[0], sin[0], factors[0])
    tail_sums, tail = _finish_part(gradient[1], raw[1], cos[1], sin[1], factors[1])
    result = wide, tail
    if NORM:
        result = subtract_along(result, raw, reciprocal, HEAD_SIZE)
    return (wide_sums, tail_sums), result


@triton.jit
def finish_keys(gradient, raw, cos, sin, reciprocal, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """From the gradient of k̂ to that of the raw keys: float32 head tiles [m, D]; `reciprocal` [m] of the keys."""
    if NORM:
        gradient = rotate_back(scale_rows_apart(gradient, reciprocal), cos, sin)
        return subtract_along(gradient, raw, reciprocal, HEAD_SIZE)
    else:
        return rotate_back(gradient, cos, sin)
