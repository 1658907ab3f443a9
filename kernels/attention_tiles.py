"""Pieces shared by the attention kernels: tiles of one head, matrix products over a split head, RMS norm of rows.

A head of D columns is held as two tiles side by side, WIDE and TAIL columns (72 = 64 + 16, of which 8 are padding), so
that every matrix product has a power-of-two shape that the matrix units take: 80 columns of work for 72, where one tile
would need 128. Padding columns are read as zero and never written.

Letters: D head size, S tokens of a frame, H heads. Tiles are [rows, WIDE] and [rows, TAIL].
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_TILE = 16  # the matrix units take nothing narrower


def split_head(head_size: int) -> tuple[int, int]:
    """Returns (WIDE, TAIL): two powers of two of at least 16 that together hold the head: 72 → (64, 16).

    Raises:
        ValueError: the head size is not a multiple of 8 from 8 to 128.
    """
    if head_size % 8 or not 8 <= head_size <= 128:
        raise ValueError(f"head size {head_size} is not supported by the Triton kernels: a multiple of 8 up to 128 is")
    wide = max(SMALLEST_TILE, triton.next_power_of_2(head_size) // 2)
    return wide, max(SMALLEST_TILE, triton.next_power_of_2(max(head_size - wide, 0)))


@triton.jit
def load_rows(
    pointer,
    rows,
    inside,
    ROW_STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Columns FIRST … FIRST + WIDTH of the given rows of one head, [rows, WIDTH]; zero where not `inside` or padding.

    `pointer` already points to the head's first column; strides are constexpr so that loads are sixteen bytes wide.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * ROW_STRIDE + columns[None, :]
    if FIRST + WIDTH <= HEAD_SIZE:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers, mask=inside[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(
    pointer,
    tile,
    rows,
    inside,
    ROW_STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Writes `tile` [rows, WIDTH] in the pointer's dtype, as `load_rows` reads it."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * ROW_STRIDE + columns[None, :]
    mask = inside[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(pointer, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Entries FIRST … FIRST + WIDTH of a vector [D] as float32 [WIDTH]; padding is zero."""
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(pointer + columns, mask=columns < HEAD_SIZE, other=0.0).to(tl.float32)


@triton.jit
def dot_rows(left_wide, left_tail, right_wide, right_tail):
    """left · rightᵀ over the columns of a head: [m, D], [n, D] → float32 [m, n]."""
    product = tl.dot(left_wide, tl.trans(right_wide), input_precision="ieee")
    return tl.dot(left_tail, tl.trans(right_tail), product, input_precision="ieee")


@triton.jit
def reciprocal_rms(wide, tail, eps, HEAD_SIZE: tl.constexpr):
    """1 / sqrt(mean(z²) + eps) of each row z of a head, float32 [rows]."""
    wide = wide.to(tl.float32)
    tail = tail.to(tl.float32)
    squares = tl.sum(wide * wide, axis=1) + tl.sum(tail * tail, axis=1)
    return tl.rsqrt(squares / HEAD_SIZE + eps)


@triton.jit
def rms_norm_gradient(gradient_wide, gradient_tail, normed_wide, normed_tail, reciprocal, HEAD_SIZE: tl.constexpr):
    """Gradient of z from that of normed = z · reciprocal_rms(z): (g - normed · mean(g · normed)) · reciprocal.

    All tiles float32; `reciprocal` [rows].
    """
    along = tl.sum(gradient_wide * normed_wide, axis=1) + tl.sum(gradient_tail * normed_tail, axis=1)
    along = (along / HEAD_SIZE)[:, None]
    factor = reciprocal[:, None]
    return (gradient_wide - normed_wide * along) * factor, (gradient_tail - normed_tail * along) * factor
