"""Triton kernels of temporal attention for videos of more than 64 frames, forward and backward.

One program computes 64 frames of one place and head and loops over the other frames of the place in blocks of 64;
qkv is read in place. With QK-norm |logit| ≤ sqrt(D) · max|W|; while that is small, known from the weights alone, exp2
needs no running maximum, and all programs of a launch take that branch. The formulas of the backward pass are in
temporal_attention_backward; here P comes from the forward pass's log_sums, and two kernels without atomics follow one
another:

    queries (first): δ = rowsum(g · output), dq and the parts of G     one program per block of queries
    keys (second):   dk and dv                                         one program per block of keys

All of them round the same numbers to the same operands, so probabilities sum to one however large the logits are.

FLOPs for each token: 4·T·H·D forward, 14·T·H·D backward (10 useful). A place's rows are read once for each of its
blocks; from the second time on mostly from the cache, as the blocks of a place are neighbours in the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    add_product,
    dot_rows,
    load_head,
    multiply,
    scale_rows,
    store_head,
    store_vector,
    to_dtype,
    to_float32,
    zero_head,
)
from .configurations import Configuration, select
from .layout import PLACE_TILE_ROWS
from .registration import on_device
from .rotary_tiles import load_angles
from .temporal_tiles import block_rows, finish_keys, finish_queries, load_block, load_normed, query_factors

CANDIDATES = (Configuration(num_warps=4, num_stages=1), Configuration(num_warps=4, num_stages=2))
CONFIGURATIONS = {
    "temporal_attention_long_forward": {"any": CANDIDATES},
    "temporal_attention_long_queries": {"any": CANDIDATES},
    "temporal_attention_long_keys": {"any": CANDIDATES},
}

# Bounded softmax is used up to this |logit| in base 2. Its largest probability 2^limit must fit the dtype (float16 ends
# at 2^16) and its smallest keep full precision (float16: 2^-14).
BOUNDED_UP_TO = {torch.float32: 60.0, torch.bfloat16: 60.0, torch.float16: 14.0}


@triton.jit
def _attend(
    q,  # head tile [ROWS, D]: normed queries · W · log2(e) / sqrt(D), rounded to the dtype of qkv
    keys,  # pointer to the head's first key column in token 0
    cos,
    sin,
    first_token,
    frames,
    frame_tokens,
    eps,
    BOUNDED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """softmax(q · k̂ᵀ) · v over all frames of a place, float32 head tile, and log2 of the sum of exp2 [ROWS]."""
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    dtype: tl.constexpr = q[0].dtype
    sums = zero_head(ROWS, HEAD_SIZE)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], 0.0 if BOUNDED else -1e30, tl.float32)  # finite, so that a difference is never NaN
    for start in range(0, frames, ROWS):
        token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)
        k, _ = load_normed(keys, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        scores = tl.where(inside[None, :], dot_rows(q, to_dtype(k, dtype)), float("-inf"))  # [ROWS, ROWS]
        if BOUNDED:
            probabilities = tl.exp2(scores)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            probabilities = tl.exp2(scores - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum *= rescale
            sums = scale_rows(sums, rescale)
            row_max = new_max
        row_sum += tl.sum(probabilities, axis=1)
        v = load_head(keys + HEADS * HEAD_SIZE, token, inside, TOKEN_STRIDE, HEAD_SIZE)
        sums = add_product(sums, probabilities.to(dtype), v)
    return scale_rows(sums, 1.0 / row_sum), row_max + tl.log2(row_sum)


@triton.jit
def _forward(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    blocks,  # int32 [blocks, 4]
    output,  # [N, H, D] out
    log_sums,  # float32 [N, H] out: log2 of each row's sum of exp2
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BOUNDED_LIMIT: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_SCALE: tl.constexpr = 1.4426950408889634 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    first_token, frames, frame_tokens, start = load_block(blocks + program // HEADS * 4)
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)
    q, _ = load_normed(queries, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    factors = query_factors(q_weight, k_weight, LOG2_SCALE, NORM, HEAD_SIZE)
    q = to_dtype(multiply(q, factors), qkv.dtype.element_ty)
    bound = float("inf")
    if NORM:
        bound = tl.maximum(tl.max(tl.abs(factors[0])), tl.max(tl.abs(factors[1]))) * HEAD_SIZE
    if bound <= BOUNDED_LIMIT:
        result, log_sum = _attend(
            q, keys, cos, sin, first_token, frames, frame_tokens, eps, True, NORM, HEADS, HEAD_SIZE, ROWS
        )
    else:
        result, log_sum = _attend(
            q, keys, cos, sin, first_token, frames, frame_tokens, eps, False, NORM, HEADS, HEAD_SIZE, ROWS
        )
    store_head(output + head * HEAD_SIZE, result, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    tl.store(log_sums + token * HEADS + head, log_sum, mask=inside)


@triton.jit
def _queries(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    blocks,
    output,
    output_gradient,
    log_sums,
    deltas,  # float32 [N, H] out
    qkv_gradient,  # [N, 3, H, D] out
    partials,  # float32 [blocks · H, D] out, or None
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_E: tl.constexpr = 1.4426950408889634
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    dtype: tl.constexpr = qkv.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    first_token, frames, frame_tokens, start = load_block(blocks + program // HEADS * 4)
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)

    g = load_head(output_gradient + head * HEAD_SIZE, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    o = load_head(output + head * HEAD_SIZE, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    o = multiply(to_float32(o), to_float32(g))
    delta = tl.sum(o[0], axis=1) + tl.sum(o[1], axis=1)
    tl.store(deltas + token * HEADS + head, delta, mask=inside)
    g = to_dtype(g, dtype)
    log_sum = tl.load(log_sums + token * HEADS + head, mask=inside, other=float("inf"))  # makes P zero

    q, reciprocal = load_normed(queries, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    q = to_dtype(multiply(q, query_factors(q_weight, k_weight, SCALE * LOG2_E, NORM, HEAD_SIZE)), dtype)
    sums = zero_head(ROWS, HEAD_SIZE)  # dS · k̂
    for key_start in range(0, frames, ROWS):
        key_token, key_frame, is_key = block_rows(first_token, frames, frame_tokens, key_start, ROWS)
        k, _ = load_normed(keys, cos, sin, key_token, key_frame, is_key, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        k = to_dtype(k, dtype)
        probabilities = tl.where(is_key[None, :], tl.exp2(dot_rows(q, k) - log_sum[:, None]), 0.0)  # [ROWS, ROWS]
        v = load_head(keys + HEADS * HEAD_SIZE, key_token, is_key, TOKEN_STRIDE, HEAD_SIZE)
        logit_gradient = probabilities * (dot_rows(g, v) - delta[:, None])
        sums = add_product(sums, logit_gradient.to(dtype), k)

    q = to_float32(load_head(queries, token, inside, TOKEN_STRIDE, HEAD_SIZE))
    factors = query_factors(q_weight, k_weight, SCALE, NORM, HEAD_SIZE)
    cosines = load_angles(cos, frame, HEAD_SIZE)
    sines = load_angles(sin, frame, HEAD_SIZE)
    column_sums, gradient = finish_queries(sums, q, cosines, sines, factors, reciprocal, NORM, HEAD_SIZE)
    if partials is not None:
        store_vector(partials + program * HEAD_SIZE, (column_sums[0] * SCALE, column_sums[1] * SCALE), HEAD_SIZE)
    store_head(qkv_gradient + head * HEAD_SIZE, gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)


@triton.jit
def _keys(
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
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_E: tl.constexpr = 1.4426950408889634
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    dtype: tl.constexpr = qkv.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    first_token, frames, frame_tokens, start = load_block(blocks + program // HEADS * 4)
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)

    k, reciprocal = load_normed(keys, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    k = to_dtype(k, dtype)
    v = load_head(keys + HEADS * HEAD_SIZE, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    factors = query_factors(q_weight, k_weight, SCALE * LOG2_E, NORM, HEAD_SIZE)
    key_sums = zero_head(ROWS, HEAD_SIZE)
    value_sums = zero_head(ROWS, HEAD_SIZE)
    for query_start in range(0, frames, ROWS):
        query_token, query_frame, is_query = block_rows(first_token, frames, frame_tokens, query_start, ROWS)
        q, _ = load_normed(queries, cos, sin, query_token, query_frame, is_query, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        q = to_dtype(multiply(q, factors), dtype)
        in_rows = query_token * HEADS + head
        log_sum = tl.load(log_sums + in_rows, mask=is_query, other=float("inf"))  # makes P zero
        probabilities = tl.exp2(dot_rows(q, k) - log_sum[:, None])  # [queries, keys]
        g = load_head(output_gradient + head * HEAD_SIZE, query_token, is_query, HEADS * HEAD_SIZE, HEAD_SIZE)
        g = to_dtype(g, dtype)
        value_sums = add_product(value_sums, tl.trans(probabilities.to(dtype)), g)
        delta = tl.load(deltas + in_rows, mask=is_query, other=0.0)
        logit_gradient = probabilities * (dot_rows(g, v) - delta[:, None])
        key_sums = add_product(key_sums, tl.trans(logit_gradient.to(dtype)), q)

    gradients = qkv_gradient + (HEADS + head) * HEAD_SIZE
    store_head(gradients + HEADS * HEAD_SIZE, value_sums, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    key_sums = key_sums[0] / LOG2_E, key_sums[1] / LOG2_E
    k = to_float32(load_head(keys, token, inside, TOKEN_STRIDE, HEAD_SIZE))
    cosines = load_angles(cos, frame, HEAD_SIZE)
    sines = load_angles(sin, frame, HEAD_SIZE)
    gradient = finish_keys(key_sums, k, cosines, sines, reciprocal, NORM, HEAD_SIZE)
    store_head(gradients, gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)


def launch_long_forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    blocks: Tensor,
    output: Tensor,
    log_sums: Tensor,
    eps: float,
) -> None:
    """Writes `output` [N, H, D] and `log_sums` [N, H] of the long videos. All contiguous."""
    heads, head_size = qkv.shape[2:]
    if not blocks.shape[0]:
        return
    with on_device(qkv):
        _forward[(blocks.shape[0] * heads,)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            blocks,
            output,
            log_sums,
            eps,
            HEADS=heads,
            HEAD_SIZE=head_size,
            ROWS=PLACE_TILE_ROWS,
            BOUNDED_LIMIT=BOUNDED_UP_TO[qkv.dtype],
            **select(CONFIGURATIONS, "temporal_attention_long_forward", "any", qkv.device).launch,
        )


def launch_long_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    blocks: Tensor,
    output: Tensor,
    log_sums: Tensor,
    qkv_gradient: Tensor,
    partials: Tensor | None,
    eps: float,
) -> None:
    """Writes `qkv_gradient` of the long videos and the parts of G, float32 [blocks · H, D]. All contiguous."""
    heads, head_size = qkv.shape[2:]
    if not blocks.shape[0]:
        return
    deltas = torch.empty_like(log_sums)
    with on_device(qkv):
        _queries[(blocks.shape[0] * heads,)](
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
            eps,
            HEADS=heads,
            HEAD_SIZE=head_size,
            ROWS=PLACE_TILE_ROWS,
            **select(CONFIGURATIONS, "temporal_attention_long_queries", "any", qkv.device).launch,
        )
        _keys[(blocks.shape[0] * heads,)](
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
            eps,
            HEADS=heads,
            HEAD_SIZE=head_size,
            ROWS=PLACE_TILE_ROWS,
            **select(CONFIGURATIONS, "temporal_attention_long_keys", "any", qkv.device).launch,
        )
