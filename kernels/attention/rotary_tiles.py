"""Rotary embedding of head tiles, and RMS norms of rows whose two tiles stay apart (`tiles.hand_over`).

A head tile is a pair (wide, tail), see tiles. Rotation works on interleaved pairs of columns: a row of sixteen-byte
pieces is split into its even and odd columns and joined again within the registers of one thread, so
loads stay wide and nothing passes through shared memory [compiled].

Letters: D head size, m rows, T frames.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import hand_over, scale_rows_apart, tail_of, to_float32, wide_of


@triton.jit
def _load_angles_part(table, frames, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr):
    PAIRS: tl.constexpr = HEAD_SIZE // 2
    pairs = FIRST // 2 + tl.arange(0, WIDTH // 2)
    pointers = table + frames[:, None] * PAIRS + pairs[None, :]
    if FIRST + WIDTH <= HEAD_SIZE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(pairs < PAIRS)[None, :], other=0.0)


@triton.jit
def _load_angles(table, frames, HEAD_SIZE: tl.constexpr):
    return (
        _load_angles_part(table, frames, 0, wide_of(HEAD_SIZE), HEAD_SIZE),
        _load_angles_part(table, frames, wide_of(HEAD_SIZE), tail_of(HEAD_SIZE), HEAD_SIZE),
    )


@triton.jit
def load_angles(cos, sin, frames, HEAD_SIZE: tl.constexpr):
    """Rows `frames` [m] of two float32 tables [T, D/2]: (cosines, sines), each a pair [m, wide/2], [m, tail/2].

    Padding is zero.
    """
    return _load_angles(cos, frames, HEAD_SIZE), _load_angles(sin, frames, HEAD_SIZE)


@triton.jit
def split_columns(tile):
    """[m, n] → even columns, odd columns, each [m, n/2]."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
def join_columns(even, odd):
    """The opposite of `split_columns`."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def _round(tile, dtype: tl.constexpr):
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), axis=2).to(dtype)


@triton.jit
def round_joined(head, dtype: tl.constexpr):
    """`tiles.to_dtype` of a float32 head tile that was made by `join_columns`, for matrix products.

    The sum over an axis of length one is no instruction. It hides the joining of columns from the compiler, which would
    give such products operands of four columns a thread, read and rearranged by more instructions [compiled: 2520
    in place of 2720 for the backward of a tile of 16 rows].
    """
    return _round(head[0], dtype), _round(head[1], dtype)


@triton.jit
def _rotate(tile, cos, sin):
    even, odd = split_columns(tile)
    return join_columns(even * cos - odd * sin, odd * cos + even * sin)


@triton.jit
def rotate(head, angles):
    """Rotary embedding of a float32 head tile [m, D] by the angles of `load_angles`."""
    cos, sin = angles
    return _rotate(head[0], cos[0], sin[0]), _rotate(head[1], cos[1], sin[1])


@triton.jit
def _rotate_back(tile, cos, sin):
    even, odd = split_columns(tile)
    return join_columns(even * cos + odd * sin, odd * cos - even * sin)


@triton.jit
def rotate_back(head, angles):
    """The inverse of `rotate`, which is also its gradient."""
    cos, sin = angles
    return _rotate_back(head[0], cos[0], sin[0]), _rotate_back(head[1], cos[1], sin[1])


@triton.jit
def reciprocal_rms_apart(head, eps, HEAD_SIZE: tl.constexpr):
    """`tiles.reciprocal_rms` of a float32 head tile [m, D]."""
    squares = hand_over(tl.sum(head[0] * head[0], axis=1)) + tl.sum(head[1] * head[1], axis=1)
    return tl.rsqrt(squares / HEAD_SIZE + eps)


@triton.jit
def subtract_along(gradient, head, reciprocal, HEAD_SIZE: tl.constexpr):
    """g - z · mean(g · z) · reciprocal² of each row: the gradient of z from g = reciprocal · that of the normed z.

    Both float32 head tiles [m, D]; `reciprocal` [m] is z's reciprocal RMS. Rotation keeps lengths and angles, so z may
    be the raw row when g was rotated back.
    """
    wide = hand_over(tl.sum(gradient[0] * head[0], axis=1))
    along = (wide + tl.sum(gradient[1] * head[1], axis=1)) * reciprocal * reciprocal / HEAD_SIZE
    head = scale_rows_apart(head, along)
    return gradient[0] - head[0], gradient[1] - head[1]


@triton.jit
def subtract_rows(gradient, head, factors):
    """g - z · factors of each row: float32 head tile [m, D], head tile [m, D] of any dtype, factors [m]."""
    head = scale_rows_apart(to_float32(head), factors)
    return gradient[0] - head[0], gradient[1] - head[1]
