"""Triton kernel of spatial attention, backward: the gradient of the queries, and what spatial_keys_backward needs.

One program per tile of ROWS queries and head, looping over the frame's keys. The formulas are in spatial_backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..configurations import Configuration
from .loops import NO_NORM, NORM_DONE, center, is_folded, query_gradient
from .spatial_preparation import place_of_keys_and_values
from .tiles import (
    LOG2_E,
    append_number,
    fold_query,
    load_head,
    load_tile,
    load_weight_product,
    multiply,
    padded_rows,
    rms_norm_gradient,
    row_products,
    scale_head,
    scale_rows,
    store_column_sums,
    store_head,
    to_float32,
)

CONFIGURATIONS = {
    "spatial_attention_queries_backward": {
        "small": (
            # One or two warps hardly wait for each other; one was faster on an H200.
            Configuration(ROWS=32, STEP=32, REMAINDER=16, num_warps=1, num_stages=2),
            Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=2, num_stages=2),
            # 168 registers a thread: three programs of four warps fit on a multiprocessor.
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
        ),
        # Shared memory holds two programs there, whatever the registers.
        "small@sm_100": (Configuration(ROWS=64, STEP=64, REMAINDER=16, num_warps=4, num_stages=2),),
        "small@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=2),),
        # Rests in steps of 32 were 1 to 2 % faster on an H200, and spill 8 bytes with triton 3.7.1.
        "medium": (
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=128, REMAINDER=32, num_warps=4, num_stages=2),
        ),
        "medium@sm_100": (Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),),
        "medium@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),),
        "large": (
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=128, REMAINDER=32, num_warps=4, num_stages=2),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=3),
        ),
        # Steps of 128 need more tensor memory than there is, and the build is a kernel that only traps.
        "large@sm_100": (Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),),
        "large@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, num_warps=8, num_stages=1),),
    },
}


@triton.jit(do_not_specialize=["num_tokens"])
def spatial_queries_backward(
    qkv,  # [N, 3, H, D]
    prepared,  # of spatial_preparation, or None
    q_weight,  # [D] or None
    k_weight,
    output,  # [N, H, D]
    output_gradient,  # [N, H, D]
    statistics,  # float32 [1 or 3, H, N]
    deltas,  # float32 [H, N] out: δ, where spatial_keys_backward does not find it beside the gradient
    scaled_queries,  # out, with QK-norm: q', [N, H, D] or padded rows
    padded_gradient,  # out, where scores are folded: padded rows
    qkv_gradient,  # [N, 3, H, D] out: the queries
    weight_partials,  # float32 [tiles, H, D] out, with QK-norm: parts of G; or None
    tiles,  # int32 [tiles, 4]
    num_tokens,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    OUTPUT_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    KEY_STRIDE: tl.constexpr = OUTPUT_STRIDE if NORM == NORM_DONE else TOKEN_STRIDE
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    CENTERED: tl.constexpr = NORM != NO_NORM and qkv.dtype.element_ty != tl.float32  # which hardly rounds the output
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, length, first_row = load_tile(tiles, HEADS)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length

    frame = qkv + first_token * TOKEN_STRIDE + head * HEAD_SIZE
    in_output = first_token * OUTPUT_STRIDE + head * HEAD_SIZE
    in_statistics = head * num_tokens + first_token
    g = load_head(output_gradient + in_output, rows, inside, OUTPUT_STRIDE, HEAD_SIZE)  # [ROWS, D]
    delta = row_products(load_head(output + in_output, rows, inside, OUTPUT_STRIDE, HEAD_SIZE), g)
    if not CENTERED:
        tl.store(deltas + in_statistics + rows, delta, mask=inside)
    log_sum = tl.load(statistics + in_statistics + rows, mask=inside, other=0.0 if FOLDED else float("inf"))
    keys, values = place_of_keys_and_values(qkv, prepared, head, num_tokens, first_token, NORM, HEADS, HEAD_SIZE)
    if FOLDED:
        left_queries = padded_rows(scaled_queries, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        g = append_number(g, -delta, HEAD_SIZE)
        if not CENTERED:
            left_gradient = padded_rows(padded_gradient, head, num_tokens, first_token, HEADS, HEAD_SIZE)
            store_head(left_gradient, g, rows, inside, None, HEAD_SIZE, FOLDED)
    else:
        left_queries = scaled_queries + in_output

    q = load_head(frame, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
    if NORM != NO_NORM:
        query_factors = statistics + HEADS * num_tokens + in_statistics + rows
        factors = tl.load(query_factors, mask=inside, other=0.0)
        q = fold_query(q, factors * (SCALE * LOG2_E), load_weight_product(q_weight, k_weight, HEAD_SIZE))
        if FOLDED:
            q = append_number(q, -log_sum, HEAD_SIZE)
        store_head(left_queries, q, rows, inside, OUTPUT_STRIDE, HEAD_SIZE, FOLDED)
    sums, row_sums = query_gradient(
        q,
        g,
        log_sum,
        delta,
        keys,
        values,
        statistics + 2 * HEADS * num_tokens + in_statistics,
        length,
        STEP=STEP,
        REMAINDER=REMAINDER,
        NORM=NORM,
        SCALE=SCALE * LOG2_E if NORM == NO_NORM else 1.0,
        KEY_STRIDE=KEY_STRIDE,
        VALUE_STRIDE=TOKEN_STRIDE,
        HEAD_SIZE=HEAD_SIZE,
        CENTERED=CENTERED,
    )
    # Read again what the loop did not need, so that it does not occupy registers there.
    head, first_token, length, first_row = load_tile(tiles, HEADS, AGAIN=True)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    if CENTERED:
        delta += row_sums  # that of the output before it was rounded
        if FOLDED:
            g = load_head(
                output_gradient + first_token * OUTPUT_STRIDE + head * HEAD_SIZE, rows, inside, OUTPUT_STRIDE, HEAD_SIZE
            )
            left_gradient = padded_rows(padded_gradient, head, num_tokens, first_token, HEADS, HEAD_SIZE)
            store_head(left_gradient, append_number(g, -delta, HEAD_SIZE), rows, inside, None, HEAD_SIZE, FOLDED)
        else:
            tl.store(deltas + head * num_tokens + first_token + rows, delta, mask=inside)
    if NORM != NO_NORM:
        query_factors = statistics + (HEADS + head) * num_tokens + first_token + rows
        factors = tl.load(query_factors, mask=inside, other=0.0, cache_modifier=".ca")
        frame = qkv + first_token * TOKEN_STRIDE + head * HEAD_SIZE
        # Before the products of `center`: so sums of theirs and of these rows are left in the layout of products.
        normed = scale_rows(to_float32(load_head(frame, rows, inside, TOKEN_STRIDE, HEAD_SIZE)), factors)  # q̂
    if CENTERED:
        keys, _ = place_of_keys_and_values(qkv, prepared, head, num_tokens, first_token, NORM, HEADS, HEAD_SIZE)
        key_factors = statistics + (2 * HEADS + head) * num_tokens + first_token
        sums = center(sums, row_sums, keys, key_factors, length, REMAINDER, NORM, KEY_STRIDE, HEAD_SIZE)
    scale = tl.where(length > 1, SCALE, 0.0)  # a lone key has probability one: nothing moves it
    sums = scale_head(sums, scale)  # dS · k̂ / sqrt(D)
    if NORM != NO_NORM:
        store_column_sums(weight_partials, multiply(sums, normed), None, HEAD_SIZE)  # rows outside are zero
        sums = multiply(sums, load_weight_product(q_weight, k_weight, HEAD_SIZE, AGAIN=True))
        sums = rms_norm_gradient(sums, normed, factors, HEAD_SIZE)
    gradient = qkv_gradient + first_token * TOKEN_STRIDE + head * HEAD_SIZE
    store_head(gradient, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
