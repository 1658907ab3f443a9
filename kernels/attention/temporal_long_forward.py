"""Triton kernel of temporal attention, forward, for videos whose frames do not fit into one tile.

One program computes a block of frames of one place and head and loops over the frames of the place in steps of STEP;
qkv is read in place. With QK-norm |logit| ≤ sqrt(D) · max|q_weight · k_weight|; while that is small, known from the
weights alone, exp2 needs no running maximum, and all programs of a launch take that branch.

FLOPs for each token: 4·T·H·D. A place's rows are read once for each of its blocks; from the second time on mostly from
the cache, as the blocks of a place are neighbours in the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from ..layout import PLACE_BLOCK_ROWS
from .builds import attention_case
from .temporal_tiles import COMPILED_DTYPES, block_class, block_rows, load_block, load_normed, query_factors
from .tiles import (
    BOUNDED_UP_TO,
    LOG2_E,
    add_product,
    dot_rows,
    load_head,
    multiply,
    scale_rows,
    store_head,
    to_dtype,
    zero_head,
)

CONFIGURATIONS = {
    "temporal_attention_long_forward": {
        "half": (
            Configuration(STEP=32, num_warps=4, num_stages=2),
            Configuration(STEP=64, num_warps=4, num_stages=2),
            Configuration(STEP=32, num_warps=4, num_stages=1),
        ),
        "float32": (Configuration(STEP=16, num_warps=8, num_stages=1),),
    },
}


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
    STEP: tl.constexpr,
):
    """softmax(q · k̂ᵀ) · v over all frames of a place, float32 head tile, and log2 of the sum of exp2 [ROWS]."""
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    dtype: tl.constexpr = q[0].dtype
    sums = zero_head(ROWS, HEAD_SIZE)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], 0.0 if BOUNDED else -1e30, tl.float32)  # finite, so that a difference is never NaN
    for start in range(0, frames, STEP):
        token, frame, inside = block_rows(first_token, frames, frame_tokens, start, STEP)
        k, _ = load_normed(keys, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
        scores = tl.where(inside[None, :], dot_rows(q, to_dtype(k, dtype)), float("-inf"))  # [ROWS, STEP]
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
    STEP: tl.constexpr,
    BOUNDED_LIMIT: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_SCALE: tl.constexpr = LOG2_E / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    program, head, first_token, frames, frame_tokens, start = load_block(blocks, HEADS)
    queries = qkv + head * HEAD_SIZE
    keys = queries + HEADS * HEAD_SIZE
    token, frame, inside = block_rows(first_token, frames, frame_tokens, start, ROWS)
    q, _ = load_normed(queries, cos, sin, token, frame, inside, eps, NORM, TOKEN_STRIDE, HEAD_SIZE)
    factors = query_factors(q_weight, k_weight, LOG2_SCALE, NORM, HEAD_SIZE)
    q = to_dtype(multiply(q, factors), qkv.dtype.element_ty)
    bound = float("inf")
    if NORM:
        bound = tl.maximum(tl.max(tl.abs(factors[0])), tl.max(tl.abs(factors[1]))) * HEAD_SIZE
    if bound <= BOUNDED_LIMIT:
        result, log_sum = _attend(
            q, keys, cos, sin, first_token, frames, frame_tokens, eps, True, NORM, HEADS, HEAD_SIZE, ROWS, STEP
        )
    else:
        result, log_sum = _attend(
            q, keys, cos, sin, first_token, frames, frame_tokens, eps, False, NORM, HEADS, HEAD_SIZE, ROWS, STEP
        )
    store_head(output + head * HEAD_SIZE, result, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    tl.store(log_sums + token * HEADS + head, log_sum, mask=inside)


def launch_long_forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    blocks: Tensor,
    rows: int,
    output: Tensor,
    log_sums: Tensor,
    eps: float,
) -> None:
    """Writes `output` [N, H, D] and `log_sums` [N, H] of the long videos. All contiguous."""
    heads, head_size = qkv.shape[2:]
    if not blocks.shape[0]:
        return
    launch(
        _forward,
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
            log_sums,
            eps,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "ROWS": rows,
            "BOUNDED_LIMIT": BOUNDED_UP_TO[qkv.dtype],
            **select(CONFIGURATIONS, "temporal_attention_long_forward", block_class(qkv.dtype), qkv.device).launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    kernel = "temporal_attention_long_forward"
    cases = []
    for name, dtype in COMPILED_DTYPES.items():
        rows = PLACE_BLOCK_ROWS[0 if dtype == torch.float32 else 64]
        configuration = candidates_of(CONFIGURATIONS, kernel, block_class(dtype), arch)[0]
        constants = {"ROWS": rows, "BOUNDED_LIMIT": BOUNDED_UP_TO[dtype]}
        work = rows * configuration["STEP"]
        cases.append(attention_case(kernel, _forward, configuration, name, constants, work=work))
    return cases
