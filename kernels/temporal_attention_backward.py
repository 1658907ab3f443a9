"""Triton kernel of temporal attention, backward, for videos whose frames fit into one tile of up to 128 rows.

One pass, no atomics: a program holds all frames of its places, so it recomputes the softmax and needs neither the
output nor its statistics. With g the output's gradient, P the probabilities, q̂ k̂ the rotated rows over their RMS, r the
reciprocal RMS, R the rotation and W = q_weight · k_weight,

    dV = Pᵀ · g        dS = P · (g · Vᵀ - rowsum(P · (g · Vᵀ)))
    d q̂ = W · (dS · k̂) / sqrt(D)        d k̂ = W · (dSᵀ · q̂) / sqrt(D)
    dq = r · (R⁻¹ d q̂ - q · r² · mean(R⁻¹ d q̂ · q)), likewise dk

Both weights' gradients come from the one sum G = Σ (dS · k̂) · q̂ / sqrt(D) over all rows and heads: dq_weight =
k_weight · G, dk_weight = q_weight · G. Each program writes its part of G to a row of its own; the rows are summed
afterwards. Without QK-norm r = W = 1 and the mean is left out.

Bytes for each token: 14·H·D (half precision), and 4·H·D / ROWS for G; images read g only and write, 8·H·D.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    add_product,
    dot_rows,
    load_head,
    multiply,
    store_column_sums,
    store_head,
    store_vector,
    to_dtype,
    to_float32,
    zero_head,
)
from .configurations import CompileCase, Configuration, candidates_of, select
from .registration import on_device
from .rotary_tiles import load_angles
from .temporal_tiles import finish_keys, finish_queries, normed_rows, place_rows, query_factors

# EARLY reads v and the output's gradient before the queries are normed, which hides the wait for them behind that work
# and costs 40 registers.
CONFIGURATIONS = {
    "temporal_attention_backward": {
        "16 rows": (
            Configuration(EARLY=1, num_warps=1, num_stages=1),
            Configuration(EARLY=1, num_warps=1, num_stages=1, maxnreg=168),
            Configuration(EARLY=0, num_warps=1, num_stages=1, maxnreg=168),
        ),
        "32 rows": (
            Configuration(EARLY=1, num_warps=2, num_stages=1),
            Configuration(EARLY=0, num_warps=2, num_stages=1),
        ),
        "64 rows": (
            Configuration(EARLY=0, num_warps=4, num_stages=1),
            Configuration(EARLY=1, num_warps=4, num_stages=1),
            Configuration(EARLY=1, num_warps=8, num_stages=1),
        ),
        "64 rows@sm_80": (Configuration(EARLY=0, num_warps=8, num_stages=1),),  # four warps would spill
        "128 rows": (Configuration(EARLY=0, num_warps=8, num_stages=1),),
    },
}


@triton.jit
def _backward(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    tiles,  # int32 [tiles, 4]
    output_gradient,  # [N, H, D]
    qkv_gradient,  # [N, 3, H, D] out
    partials,  # float32 [tiles · H, D] out, or None
    query_bias_partials,  # float32 [tiles · H, D] out, or None
    key_bias_partials,
    value_bias_partials,
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_E: tl.constexpr = 1.4426950408889634
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program // HEADS * 4
    in_token = program % HEADS * HEAD_SIZE
    queries = qkv + in_token
    keys = queries + HEADS * HEAD_SIZE
    gradients = qkv_gradient + in_token
    token, frame, place, inside, attends = place_rows(tile, ROWS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    factors = query_factors(q_weight, k_weight, SCALE, NORM, HEAD_SIZE)

    cosines = load_angles(cos, frame, HEAD_SIZE)
    sines = load_angles(sin, frame, HEAD_SIZE)
    k = load_head(keys, token, attends, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    k, key_reciprocal = normed_rows(k, cosines, sines, eps, NORM, HEAD_SIZE)
    k = to_dtype(k, dtype)
    q = load_head(queries, token, attends, TOKEN_STRIDE, HEAD_SIZE)
    if EARLY:
        g = load_head(output_gradient + in_token, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
        v = load_head(keys + HEADS * HEAD_SIZE, token, attends, TOKEN_STRIDE, HEAD_SIZE)
    q, query_reciprocal = normed_rows(q, cosines, sines, eps, NORM, HEAD_SIZE)
    q = to_dtype(multiply(q, factors), dtype)
    logits = tl.where(place[:, None] == place[None, :], dot_rows(q, k), float("-inf"))  # [ROWS, ROWS]
    row_max = tl.max(logits, axis=1) * LOG2_E
    probabilities = tl.exp2(logits * LOG2_E - row_max[:, None])
    probabilities *= (1.0 / tl.sum(probabilities, axis=1))[:, None]

    if not EARLY:
        g = load_head(output_gradient + in_token, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    v_gradient = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(probabilities.to(dtype)), g)
    store_head(gradients + 2 * HEADS * HEAD_SIZE, v_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if value_bias_partials is not None:
        store_column_sums(value_bias_partials, v_gradient, inside, HEAD_SIZE)
    if not EARLY:
        v = load_head(keys + HEADS * HEAD_SIZE, token, attends, TOKEN_STRIDE, HEAD_SIZE)
    logit_gradient = dot_rows(g, v)
    along = tl.sum(probabilities * logit_gradient, axis=1)
    logit_gradient = (probabilities * (logit_gradient - along[:, None])).to(dtype)

    # Rows and angles are read again, now from the cache, rather than kept in registers. Being read after the products
    # also lets them decide where tiles lie from here on: a thread holds sixteen bytes of a row.
    k_gradient = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(logit_gradient), q)
    cosines = load_angles(cos, frame, HEAD_SIZE)
    sines = load_angles(sin, frame, HEAD_SIZE)
    raw = to_float32(load_head(keys, token, attends, TOKEN_STRIDE, HEAD_SIZE))
    k_gradient = finish_keys(k_gradient, raw, cosines, sines, key_reciprocal, NORM, HEAD_SIZE)
    store_head(gradients + HEADS * HEAD_SIZE, k_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if key_bias_partials is not None:
        store_column_sums(key_bias_partials, k_gradient, inside, HEAD_SIZE)
    q_gradient = add_product(zero_head(ROWS, HEAD_SIZE), logit_gradient, k)
    raw = to_float32(load_head(queries, token, attends, TOKEN_STRIDE, HEAD_SIZE))
    sums, q_gradient = finish_queries(q_gradient, raw, cosines, sines, factors, query_reciprocal, NORM, HEAD_SIZE)
    if partials is not None:
        store_vector(partials + program * HEAD_SIZE, (sums[0] * SCALE, sums[1] * SCALE), HEAD_SIZE)
    store_head(gradients, q_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if query_bias_partials is not None:
        store_column_sums(query_bias_partials, q_gradient, inside, HEAD_SIZE)


def launch_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tiles: Tensor,
    rows: int,
    qkv_gradient: Tensor,
    partials: Tensor | None,
    bias_partials: Sequence[Tensor | None],
    eps: float,
) -> None:
    """Writes `qkv_gradient` of the videos in `tiles` of so many rows, and float32 [tiles · H, D] the parts of G and
    those of the gradients of the three biases.

    All contiguous.
    """
    heads, head_size = qkv.shape[2:]
    if not tiles.shape[0]:
        return
    with on_device(qkv):
        _backward[(tiles.shape[0] * heads,)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            tiles,
            output_gradient,
            qkv_gradient,
            partials,
            *bias_partials,
            eps,
            HEADS=heads,
            HEAD_SIZE=head_size,
            ROWS=rows,
            **select(CONFIGURATIONS, "temporal_attention_backward", f"{rows} rows", qkv.device).launch,
        )


def compile_cases(arch: str) -> list[CompileCase]:
    builds = [(rows, dtype) for rows in (16, 32, 64) for dtype in ("bf16", "fp16")]
    if arch != "sm_80":  # whose videos of more than 64 frames take the kernels for long videos
        builds.append((128, "bf16"))
    cases = [_compile_case(arch, *build) for build in builds]
    if arch != "sm_80":
        cases += [_compile_case(arch, rows, "bf16", with_norm=False) for rows in (16, 64)]
    return cases


def _compile_case(arch: str, rows: int, dtype: str, with_norm: bool = True) -> CompileCase:
    absent = () if with_norm else ("q_weight", "k_weight", "partials")
    pointers = ("qkv", "q_weight", "k_weight", "output_gradient", "qkv_gradient")
    return CompileCase(
        name="temporal_attention_backward",
        kernel=_backward,
        signature={name: f"*{dtype}" for name in pointers}
        | {"cos": "*fp32", "sin": "*fp32", "tiles": "*i32", "partials": "*fp32", "eps": "fp32"}
        | dict.fromkeys(("query_bias_partials", "key_bias_partials", "value_bias_partials"), "*fp32"),
        constants=dict.fromkeys(absent) | {"HEADS": 16, "HEAD_SIZE": 72, "ROWS": rows},
        configuration=candidates_of(CONFIGURATIONS, "temporal_attention_backward", f"{rows} rows", arch)[0],
        dtype=dtype,
        attention=True,
        note=f"{rows} rows" if with_norm else f"{rows} rows; no norm",
        unit="element",
        work=rows * 72,
    )
