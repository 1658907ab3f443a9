"""Triton kernels of temporal attention, backward, for videos whose frames do not fit into one tile.

The formulas are in temporal_backward; here P comes from the forward pass's log_sums, and two kernels without
atomics follow one another, each program looping over the frames of its place in steps of STEP:

    queries (first): δ = rowsum(g · output), dq and the parts of G     one program per block of queries
    keys (second):   dk and dv                                         one program per block of keys

They round the same numbers to the same operands as the forward pass, so probabilities sum to one however large the
logits are. FLOPs for each token: 14·T·H·D (10 useful).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from ..layout import PLACE_BLOCK_ROWS
from .builds import attention_case
from .rotary_tiles import load_angles, rotate_back, subtract_along
from .temporal_tiles import (
    COMPILED_DTYPES,
    block_class,
    block_rows,
    finish_queries,
    load_block,
    load_normed,
    query_factors,
)
from .tiles import (
    LOG2_E,
    add_product,
    dot_rows,
    load_head,
    multiply,
    row_products,
    scale_rows_apart,
    store_column_sums,
    store_head,
    store_vector,
    to_dtype,
    to_float32,
    zero_head,
)

CONFIGURATIONS = {
    "temporal_attention_long_queries_backward": {
        "half": (Configuration(STEP=32, num_warps=4, num_stages=2),),
        "half@sm_80": (
            Configuration(STEP=32, num_warps=4, num_stages=1),
            Configuration(STEP=32, num_warps=8, num_stages=2),
        ),
        "float32": (Configuration(STEP=32, num_warps=8, num_stages=1),),
    },
    "temporal_attention_long_keys_backward": {
        "half": (Configuration(STEP=32, num_warps=4, num_stages=2),),
        "half@sm_100": (Configuration(STEP=32, maxnreg=255, num_warps=4, num_stages=2),),
        "half@sm_80": (
            Configuration(STEP=16, num_warps=4, num_stages=1),
            Configuration(STEP=16, num_warps=4, num_stages=2),
            Configuration(STEP=32, num_warps=8, num_stages=2),
        ),
        "float32": (Configuration(STEP=16, num_warps=8, num_stages=1),),
    },
}


@triton.jit
def _queries(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    blocks,  # int32 [blocks, 4]
    output,  # [N, H, D]
    output_gradient,  # [N, H, D]
    log_sums,  # float32 [N, H]
    deltas,  # float32 [N, H] out
    qkv_gradient,  # [N, 3, H, D] out
    partials,  # float32 [blocks · H, D] out, or None
    query_bias_partials,  # float32 [blocks · H, D] out, or None
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    dtype: tl.constexpr = qkv.dtype.element_ty
    program, head, first_token, frames, frame_tokens, start = load_block(blocks, HEADS)
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)

    g = load_head(output_gradient + head * HEAD_SIZE, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    delta = row_products(load_head(output + head * HEAD_SIZE, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE), g)
    log_sum = tl.load(log_sums + token * HEADS + head, mask=inside, other=float("inf"))  # makes P zero

    q, reciprocal = load_normed(queries, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    q = to_dtype(multiply(q, query_factors(q_weight, k_weight, SCALE * LOG2_E, NORM, HEAD_SIZE)), dtype)
    sums = zero_head(ROWS, HEAD_SIZE)  # dS · k̂
    for key_start in range(0, frames, STEP):
        key_token, key_frame, is_key = block_rows(first_token, frames, frame_tokens, key_start, STEP)
        k, _ = load_normed(keys, cos, sin, key_token, key_frame, is_key, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        k = to_dtype(k, dtype)
        probabilities = tl.where(is_key[None, :], tl.exp2(dot_rows(q, k) - log_sum[:, None]), 0.0)  # [ROWS, STEP]
        v = load_head(keys + HEADS * HEAD_SIZE, key_token, is_key, TOKEN_STRIDE, HEAD_SIZE)
        logit_gradient = probabilities * (dot_rows(g, v) - delta[:, None])
        sums = add_product(sums, logit_gradient.to(dtype), k)

    # What comes after a store is read again, rather than kept in registers throughout the loop.
    tl.store(deltas + token * HEADS + head, delta, mask=inside)
    q = to_float32(load_head(queries, token, inside, TOKEN_STRIDE, HEAD_SIZE))
    factors = query_factors(q_weight, k_weight, SCALE, NORM, HEAD_SIZE)
    angles = load_angles(cos, sin, frame, HEAD_SIZE)
    if NORM:
        sums = scale_rows_apart(sums, reciprocal)
    products, gradient = finish_queries(sums, q, angles, factors)
    if NORM:
        gradient = subtract_along(gradient, q, reciprocal, HEAD_SIZE)
    if partials is not None:
        column_sums = tl.sum(products[0], axis=0) * SCALE, tl.sum(products[1], axis=0) * SCALE
        store_vector(partials + program * HEAD_SIZE, column_sums, HEAD_SIZE)
    store_head(qkv_gradient + head * HEAD_SIZE, gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if query_bias_partials is not None:
        store_column_sums(query_bias_partials, gradient, inside, HEAD_SIZE)


@triton.jit
def _keys(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    blocks,  # int32 [blocks, 4]
    output_gradient,  # [N, H, D]
    log_sums,  # float32 [N, H]
    deltas,  # float32 [N, H]
    qkv_gradient,  # [N, 3, H, D] out
    key_bias_partials,  # float32 [blocks · H, D] out, or None
    value_bias_partials,
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    dtype: tl.constexpr = qkv.dtype.element_ty
    program, head, first_token, frames, frame_tokens, start = load_block(blocks, HEADS)
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)

    k, reciprocal = load_normed(keys, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    k = to_dtype(k, dtype)
    v = load_head(keys + HEADS * HEAD_SIZE, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    factors = query_factors(q_weight, k_weight, SCALE * LOG2_E, NORM, HEAD_SIZE)
    key_sums = zero_head(ROWS, HEAD_SIZE)
    value_sums = zero_head(ROWS, HEAD_SIZE)
    for query_start in range(0, frames, STEP):
        query_token, query_frame, is_query = block_rows(first_token, frames, frame_tokens, query_start, STEP)
        q, _ = load_normed(queries, cos, sin, query_token, query_frame, is_query, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        q = to_dtype(multiply(q, factors), dtype)
        in_rows = query_token * HEADS + head
        log_sum = tl.load(log_sums + in_rows, mask=is_query, other=float("inf"))  # makes P zero
        probabilities = tl.exp2(dot_rows(k, q) - log_sum[None, :])  # [ROWS, STEP]: keys down, queries across
        g = load_head(output_gradient + head * HEAD_SIZE, query_token, is_query, HEADS * HEAD_SIZE, HEAD_SIZE)
        value_sums = add_product(value_sums, probabilities.to(dtype), g)
        delta = tl.load(deltas + in_rows, mask=is_query, other=0.0)
        logit_gradient = probabilities * (dot_rows(v, g) - delta[None, :])
        key_sums = add_product(key_sums, logit_gradient.to(dtype), q)

    gradients = qkv_gradient + (HEADS + head) * HEAD_SIZE
    store_head(gradients + HEADS * HEAD_SIZE, value_sums, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if value_bias_partials is not None:
        store_column_sums(value_bias_partials, value_sums, inside, HEAD_SIZE)
    key_sums = key_sums[0] / LOG2_E, key_sums[1] / LOG2_E
    k = to_float32(load_head(keys, token, inside, TOKEN_STRIDE, HEAD_SIZE))
    angles = load_angles(cos, sin, frame, HEAD_SIZE)
    if NORM:
        key_sums = scale_rows_apart(key_sums, reciprocal)
    gradient = rotate_back(key_sums, angles)
    if NORM:
        gradient = subtract_along(gradient, k, reciprocal, HEAD_SIZE)
    store_head(gradients, gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if key_bias_partials is not None:
        store_column_sums(key_bias_partials, gradient, inside, HEAD_SIZE)


def launch_long_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    blocks: Tensor,
    rows: int,
    output: Tensor,
    log_sums: Tensor,
    qkv_gradient: Tensor,
    partials: Tensor | None,
    bias_partials: Sequence[Tensor | None],
    eps: float,
) -> None:
    """Writes `qkv_gradient` of the long videos, and float32 [blocks · H, D] the parts of G and those of the gradients
    of the three biases. All contiguous.
    """
    heads, head_size = qkv.shape[2:]
    if not blocks.shape[0]:
        return
    deltas = torch.empty_like(log_sums)
    launch(
        _queries,
        (blocks.shape[0] * heads,),
        qkv,
        (
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            blocks,
            output,
            output_gradient,
            log_sums,
            deltas,
            qkv_gradient,
            partials,
            bias_partials[0],
            eps,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "ROWS": rows,
            **select(
                CONFIGURATIONS, "temporal_attention_long_queries_backward", block_class(qkv.dtype), qkv.device
            ).launch,
        },
    )
    launch(
        _keys,
        (blocks.shape[0] * heads,),
        qkv,
        (
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            blocks,
            output_gradient,
            log_sums,
            deltas,
            qkv_gradient,
            *bias_partials[1:],
            eps,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "ROWS": rows,
            **select(
                CONFIGURATIONS, "temporal_attention_long_keys_backward", block_class(qkv.dtype), qkv.device
            ).launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    cases = []
    for name, dtype in COMPILED_DTYPES.items():
        rows = PLACE_BLOCK_ROWS[0 if dtype == torch.float32 else 64]
        for part, kernel in (("queries", _queries), ("keys", _keys)):
            full_name = f"temporal_attention_long_{part}_backward"
            configuration = candidates_of(CONFIGURATIONS, full_name, block_class(dtype), arch)[0]
            work = rows * configuration["STEP"]
            cases.append(attention_case(full_name, kernel, configuration, name, {"ROWS": rows}, work=work))
    return cases
