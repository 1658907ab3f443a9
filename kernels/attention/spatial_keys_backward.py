"""Triton kernel of spatial attention, backward: the gradients of keys and values, behind spatial_queries_backward.

One program per tile of ROWS keys and head, looping over the frame's queries. The formulas are in spatial_backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..configurations import Configuration
from .loops import NO_NORM, NORM_DONE, NORM_LOADED, is_folded, key_gradient
from .spatial_preparation import padded_values
from .tiles import (
    LOG2_E,
    load_head,
    load_tile,
    padded_rows,
    rms_norm_gradient,
    scale_head,
    scale_rows,
    store_head,
    to_float32,
    zero_head,
)

CONFIGURATIONS = {
    "spatial_attention_keys_backward": {
        "small": (
            Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=3),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, num_warps=4, num_stages=2),
        ),
        "small@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=2),),
        "medium": (
            Configuration(ROWS=64, STEP=32, REMAINDER=32, maxnreg=168, num_warps=4, num_stages=3),
            # Counted: a quarter fewer wavefronts of shared memory, two programs in place of three.
            Configuration(ROWS=64, STEP=64, REMAINDER=32, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=128, REMAINDER=32, num_warps=4, num_stages=2),
        ),
        "medium@sm_100": (Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),),
        "medium@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),),
        "large": (
            Configuration(ROWS=64, STEP=128, REMAINDER=32, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=128, REMAINDER=16, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=32, REMAINDER=32, num_warps=4, num_stages=3),
            Configuration(ROWS=128, STEP=128, REMAINDER=32, num_warps=8, num_stages=2),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=3),
        ),
        # As for the queries.
        "large@sm_100": (Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),),
        "large@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, num_warps=8, num_stages=1),),
        "float32@sm_80": (Configuration(ROWS=32, STEP=16, REMAINDER=16, maxnreg=128, num_warps=8, num_stages=1),),
    },
}


@triton.jit(do_not_specialize=["num_tokens"])
def spatial_keys_backward(
    qkv,  # [N, 3, H, D]
    prepared,  # of spatial_preparation, or None
    queries,  # as spatial_queries_backward leaves them
    output_gradient,  # likewise
    statistics,  # float32 [1 or 3, H, N]
    deltas,  # float32 [H, N]
    qkv_gradient,  # [N, 3, H, D] out: keys and values
    tiles,  # int32 [tiles, 4]
    num_tokens,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
):
    """`queries` are those of qkv without QK-norm, else the scaled ones [N, H, D]; where `is_folded`, they and
    `output_gradient`, else [N, H, D], are padded rows with a number.
    """
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    OUTPUT_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    QUERY_STRIDE: tl.constexpr = TOKEN_STRIDE if NORM == NO_NORM else OUTPUT_STRIDE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, length, first_row = load_tile(tiles, HEADS)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length

    keys = qkv + first_token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
    in_output = first_token * OUTPUT_STRIDE + head * HEAD_SIZE
    in_statistics = head * num_tokens + first_token
    if FOLDED:
        places = padded_rows(prepared, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        k = load_head(places, rows, inside, None, HEAD_SIZE, FOLDED)  # [ROWS, D]
        places = padded_values(prepared, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        v = load_head(places, rows, inside, None, HEAD_SIZE, FOLDED)
        streamed_queries = padded_rows(queries, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        gradients = padded_rows(output_gradient, head, num_tokens, first_token, HEADS, HEAD_SIZE)
    else:
        if NORM == NORM_DONE:
            k = load_head(prepared + in_output, rows, inside, OUTPUT_STRIDE, HEAD_SIZE)
        else:
            k = load_head(keys, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        v = load_head(keys + HEADS * HEAD_SIZE, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        streamed_queries = queries + first_token * QUERY_STRIDE + head * HEAD_SIZE
        gradients = output_gradient + in_output
    factors = None
    if NORM == NORM_LOADED:
        factors = tl.load(statistics + 2 * HEADS * num_tokens + in_statistics + rows, mask=inside, other=0.0)
    sums = zero_head(ROWS, HEAD_SIZE), zero_head(ROWS, HEAD_SIZE)
    for rest in tl.static_range(2):
        if rest:
            # Read again what the whole steps did not need, so that it does not occupy registers there.
            head, first_token, length, first_row = load_tile(tiles, HEADS, AGAIN=True)
            rows = first_row + tl.arange(0, ROWS)
            inside = rows < length
            keys = qkv + first_token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
            raw_keys = load_head(keys, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        sums = key_gradient(
            sums,
            k,
            v,
            factors,
            streamed_queries,
            gradients,
            statistics + in_statistics,
            deltas + in_statistics,
            length,
            REST=rest,
            STEP=STEP,
            REMAINDER=REMAINDER,
            NORM=NORM,
            SCALE=SCALE * LOG2_E if NORM == NO_NORM else 1.0,
            QUERY_STRIDE=QUERY_STRIDE,
            GRADIENT_STRIDE=OUTPUT_STRIDE,
            HEAD_SIZE=HEAD_SIZE,
        )
    key_sums, value_sums = sums
    gradient = qkv_gradient + first_token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
    store_head(gradient + HEADS * HEAD_SIZE, value_sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
    scale = tl.where(length > 1, SCALE if NORM == NO_NORM else 1.0 / LOG2_E, 0.0)
    key_sums = scale_head(key_sums, scale)
    if NORM != NO_NORM:
        key_factors = statistics + (2 * HEADS + head) * num_tokens + first_token + rows
        factors = tl.load(key_factors, mask=inside, other=0.0, cache_modifier=".ca")
        normed = scale_rows(to_float32(raw_keys), factors)  # k̂
        key_sums = rms_norm_gradient(key_sums, normed, factors, HEAD_SIZE)
    store_head(gradient, key_sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
