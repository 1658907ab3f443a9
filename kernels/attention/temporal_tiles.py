"""Pieces shared by the kernels of temporal attention: which rows a program has, and the way from raw rows and back.

Letters: D head size, m rows of a tile, T frames, S tokens of a frame, W = q_weight · k_weight. A head tile [m, D] is a
pair, see tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rotary_tiles import join_columns, load_angles, reciprocal_rms_apart, rotate, split_columns
from .tiles import load_head, load_weight_product, scale_head, scale_rows_apart, tail_of, to_float32, wide_of


def builds_of_tiles(arch: str) -> list[tuple[int, str, bool]]:
    """The builds of kernels for tiles: rows, dtype, whether with QK-norm."""
    builds = [(rows, dtype, True) for rows in (16, 32, 64) for dtype in ("bf16", "fp16")]
    if arch != "sm_80":  # whose videos of more than 64 frames take the kernels for blocks
        builds += [(128, "bf16", True), (16, "bf16", False), (64, "bf16", False)]
    return builds


# The builds of kernels for blocks.
COMPILED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def block_class(dtype: torch.dtype) -> str:
    """Class of the configurations of kernels for blocks: float32 multiplies outside the matrix units, unlike others."""
    return "float32" if dtype == torch.float32 else "half"


@triton.jit
def place_rows(tile, ROWS: tl.constexpr, AGAIN: tl.constexpr = False):
    """The rows of a tile of `layout.place_tiles`, each [ROWS]. AGAIN is as in `load_weight_product`.

    Returns:
        token, frame within its video, place within the tile, whether the row holds a token (else `token` is the tile's
        first), and the token whose queries and keys to read: that of the row, but where it has no other to attend to
        (T = 1), and theirs have no effect, the tile's first, which spares the bytes.
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
    inside = place < places
    token = first_token + tl.where(inside, frame * frame_tokens + place, 0)
    source = tl.where(frames > 1, token, first_token)
    return token.to(tl.int64), frame, place, inside, source.to(tl.int64)


@triton.jit
def load_block(blocks, HEADS: tl.constexpr):
    """What this program computes: one head of one of the blocks of `layout.place_tiles`; heads run fastest.

    Returns:
        (program (int64), head, token of the first frame at the place, T, S, first frame of the block).
    """
    program = tl.program_id(0).to(tl.int64)
    block = blocks + program // HEADS * 4
    return program, program % HEADS, tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)


@triton.jit
def block_rows(first_token, frames, frame_tokens, start, ROWS: tl.constexpr):
    """Frames start … start + ROWS of one place of a long video: token, frame and whether there is one, each [ROWS]."""
    rows = start + tl.arange(0, ROWS)
    inside = rows < frames
    frame = tl.minimum(rows, frames - 1)
    return (first_token + frame * frame_tokens).to(tl.int64), frame, inside


@triton.jit
def normed_rows(head, angles, eps, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Rotated and, with NORM, RMS-normed rows: float32 head tile [m, D], and the reciprocal RMS [m] (ones without)."""
    head = to_float32(head)
    if NORM:
        reciprocal = reciprocal_rms_apart(head, eps, HEAD_SIZE)  # rotation keeps lengths
        return rotate(scale_rows_apart(head, reciprocal), angles), reciprocal
    else:
        # Times one, for the seam of `scale_rows_apart`: without it the compiler rotates rows where the matrix product
        # wants them, and spills up to 888 bytes on sm_80.
        ones = tl.full([head[0].shape[0]], 1.0, tl.float32)
        return rotate(scale_rows_apart(head, ones), angles), ones


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
    angles = load_angles(cos, sin, frame, HEAD_SIZE)
    return normed_rows(head, angles, eps, NORM, HEAD_SIZE)


@triton.jit
def query_factors(q_weight, k_weight, SCALE: tl.constexpr, NORM: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """What a normed query is multiplied with: SCALE · q_weight · k_weight, or SCALE alone; a pair that broadcasts."""
    if NORM:
        return scale_head(load_weight_product(q_weight, k_weight, HEAD_SIZE), SCALE)
    else:
        return tl.full([1, 1], SCALE, tl.float32), tl.full([1, 1], SCALE, tl.float32)


@triton.jit
def _finish_part(gradient, raw, cos, sin, factors):
    """One of the tiles of `finish_queries`."""
    even, odd = split_columns(gradient)
    raw_even, raw_odd = split_columns(raw)
    products = join_columns((raw_even * cos - raw_odd * sin) * even, (raw_odd * cos + raw_even * sin) * odd)
    factors_even, factors_odd = split_columns(tl.broadcast_to(factors, [1, gradient.shape[1]]))
    even *= factors_even
    odd *= factors_odd
    return products, join_columns(even * cos + odd * sin, odd * cos - even * sin)


@triton.jit
def finish_queries(gradient, raw, angles, factors):
    """From g = r · dS · k̂ to the gradient of the raw queries, but for the part along them (`subtract_along`).

    Args:
        gradient: g times any number, float32 head tile [m, D]; r is the reciprocal RMS of each query.
        raw: queries as qkv has them, float32 head tile [m, D].
        factors: W times any number, a pair that broadcasts.

    Returns:
        (dS · k̂) · q̂ and dq, times those numbers of which each is made, float32 head tiles [m, D].
    """
    cos, sin = angles
    wide_products, wide = _finish_part(gradient[0], raw[0], cos[0], sin[0], factors[0])
    tail_products, tail = _finish_part(gradient[1], raw[1], cos[1], sin[1], factors[1])
    return (wide_products, tail_products), (wide, tail)


@triton.jit
def zero_sums(HEAD_SIZE: tl.constexpr):
    """Column sums of head tiles to start from, eight at a time: a pair float32 [wide, 8], [tail, 8]."""
    return tl.zeros([wide_of(HEAD_SIZE), 8], tl.float32), tl.zeros([tail_of(HEAD_SIZE), 8], tl.float32)


@triton.jit
def add_column_sums(sums, head, NUMBER: tl.constexpr):
    """Adds the sums over the rows of a head tile [m, D], in the dtype of its elements, to column NUMBER of `sums`.

    In small tiles by the matrix units: exchanging the rows among threads would take four times as many instructions.
    Large ones would need more registers than there are, and on sm_100 more tensor memory.
    """
    if head[0].shape[0] > 32:
        number = tl.arange(0, 8)[None, :]
        wide, tail = tl.sum(to_float32(head)[0], axis=0), tl.sum(to_float32(head)[1], axis=0)
        return (
            sums[0] + tl.where(number == NUMBER, wide[:, None], 0.0),
            sums[1] + tl.where(number == NUMBER, tail[:, None], 0.0),
        )
    chosen = (tl.arange(0, 8) == NUMBER)[None, :]
    ones = tl.broadcast_to(chosen, [head[0].shape[0], 8]).to(head[0].dtype)
    return (
        tl.dot(tl.trans(head[0]), ones, sums[0], input_precision="ieee"),
        tl.dot(tl.trans(head[1]), ones, sums[1], input_precision="ieee"),
    )


@triton.jit
def _store_sums_part(
    pointer, stride, sums, FIRST: tl.constexpr, LAST: tl.constexpr, FROM: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    columns = FROM + tl.arange(0, sums.shape[0])
    number = tl.arange(0, 8)
    wanted = (number >= FIRST) & (number <= LAST)
    pointers = pointer + number[None, :] * stride + columns[:, None]
    tl.store(pointers, sums, mask=wanted[None, :] & (columns < HEAD_SIZE)[:, None])


@triton.jit
def store_sums(pointer, stride, sums, FIRST: tl.constexpr, LAST: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Writes columns FIRST to LAST of `sums`, column i to `pointer` + i · `stride` [D]."""
    _store_sums_part(pointer, stride, sums[0], FIRST, LAST, 0, HEAD_SIZE)
    _store_sums_part(pointer, stride, sums[1], FIRST, LAST, wide_of(HEAD_SIZE), HEAD_SIZE)
