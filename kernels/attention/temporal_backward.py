"""Triton kernel of temporal attention, backward, for videos whose frames fit into one tile of up to 128 rows.

One pass, no atomics: a program holds all frames of its places, so it recomputes the softmax and needs neither the
output nor its statistics. With g the output's gradient, P the probabilities, q̂ k̂ the rotated rows over their RMS, r the
reciprocal RMS, R the rotation and W = q_weight · k_weight,

    dV = Pᵀ · g        dS = P · (g · Vᵀ - rowsum(P · (g · Vᵀ)))
    d q̂ = W · (dS · k̂) / sqrt(D)        d k̂ = W · (dSᵀ · q̂) / sqrt(D)
    dq = r · (R⁻¹ d q̂ - q · r² · mean(R⁻¹ d q̂ · q)), likewise dk

In small tiles the mean needs no pass over D: with S the logits, d q̂ · q̂ = rowsum(dS · S) and d k̂ · k̂ =
columnsum(dS · S); a large tile has more logits than columns.
Both weights' gradients come from the one sum G = Σ (dS · k̂) · q̂ / sqrt(D) over all rows and heads, see
weight_gradients. Each program writes its part of G, and of the biases' gradients, to rows of its own; they are summed
afterwards. It sums numbers rounded to the dtype of qkv, as eager PyTorch does; for dV those of g in small tiles, as the
probabilities of a query add up to one.
Without QK-norm r = W = 1 and the mean is left out.

Bytes for each token: 14·H·D (half precision), and H·D / 4 for the sums; images read g only and write, 8·H·D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import ceil_divide, launch
from .builds import attention_case
from .rotary_tiles import load_angles, rotate_back, round_joined, subtract_along, subtract_rows
from .temporal_tiles import (
    add_column_sums,
    builds_of_tiles,
    finish_queries,
    normed_rows,
    place_rows,
    query_factors,
    store_sums,
    zero_sums,
)
from .tiles import (
    LOG2_E,
    add_product,
    dot_rows,
    hand_over,
    load_head,
    multiply,
    scale_head,
    scale_rows_apart,
    store_head,
    to_float32,
    zero_head,
)

# EARLY reads v and the output's gradient before the queries are normed, which hides the wait for them behind that work
# and costs registers. With two stages a program reads its next tile, where it has one, meanwhile into shared memory.
CONFIGURATIONS = {
    "temporal_attention_backward": {
        "16 rows": (
            Configuration(EARLY=1, num_warps=1, num_stages=1),
            Configuration(EARLY=0, num_warps=1, num_stages=1),
            Configuration(EARLY=0, num_warps=1, num_stages=2),
            Configuration(EARLY=1, num_warps=1, num_stages=1, maxnreg=168),
        ),
        "16 rows@sm_100": (Configuration(EARLY=1, num_warps=2, num_stages=1),),  # one warp would spill
        "32 rows": (
            Configuration(EARLY=1, num_warps=2, num_stages=1),
            Configuration(EARLY=0, num_warps=2, num_stages=1),
        ),
        "32 rows@sm_100": (Configuration(EARLY=0, num_warps=4, num_stages=1),),  # two warps would spill
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
def _backward_tile(
    sums,  # as `zero_sums` makes them
    tile,
    head,
    eps,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    output_gradient,
    qkv_gradient,
    WITH_WEIGHTS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Writes the gradients of one tile; returns `sums` with what it adds to them."""
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    # What is made for the sums is kept to the end in small tiles, and added up at once in those short of registers.
    SMALL: tl.constexpr = ROWS <= 32
    in_token = head * HEAD_SIZE
    queries = qkv + in_token
    keys = queries + HEADS * HEAD_SIZE
    gradients = qkv_gradient + in_token
    token, frame, place, inside, source = place_rows(tile, ROWS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    factors = query_factors(q_weight, k_weight, 1.0, NORM, HEAD_SIZE)  # W

    angles = load_angles(cos, sin, frame, HEAD_SIZE)
    k = load_head(keys, source, None, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    k, key_reciprocal = normed_rows(k, angles, eps, NORM, HEAD_SIZE)
    k = round_joined(k, dtype)
    q = load_head(queries, source, None, TOKEN_STRIDE, HEAD_SIZE)
    if EARLY:
        g = load_head(output_gradient + in_token, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
        v = load_head(keys + HEADS * HEAD_SIZE, source, None, TOKEN_STRIDE, HEAD_SIZE)
    q, query_reciprocal = normed_rows(q, angles, eps, NORM, HEAD_SIZE)
    q = round_joined(multiply(q, scale_head(factors, SCALE)), dtype)
    scores = dot_rows(q, k)  # [ROWS, ROWS]
    logits = tl.where(place[:, None] == place[None, :], scores, float("-inf"))
    row_max = tl.max(logits, axis=1)
    # The difference first, which makes the probability of an image exactly one, and gradients of its logits zero.
    probabilities = tl.exp2((logits - row_max[:, None]) * LOG2_E)
    probabilities *= (1.0 / tl.sum(probabilities, axis=1))[:, None]

    if not EARLY:
        g = load_head(output_gradient + in_token, token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)
    v_gradient = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(probabilities.to(dtype)), g)
    store_head(gradients + 2 * HEADS * HEAD_SIZE, v_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if WITH_BIAS and not SMALL:
        sums = add_column_sums(sums, v_gradient, 2)
    if not EARLY:
        v = load_head(keys + HEADS * HEAD_SIZE, source, None, TOKEN_STRIDE, HEAD_SIZE)
    logit_gradient = dot_rows(g, v)
    along = tl.sum(probabilities * logit_gradient, axis=1)
    logit_gradient = probabilities * (logit_gradient - along[:, None])
    along_queries, along_keys = query_reciprocal, key_reciprocal
    if NORM and SMALL:
        along = logit_gradient * scores
        along_queries = hand_over(tl.sum(along, axis=1)) * query_reciprocal * query_reciprocal / HEAD_SIZE
        along_keys = hand_over(tl.sum(along, axis=0)) * key_reciprocal * key_reciprocal / HEAD_SIZE
    logit_gradient = logit_gradient.to(dtype)

    # Rows and angles are read again, now from the cache, rather than kept in registers. Being read after the products
    # also lets them decide where tiles lie from here on: a thread holds sixteen bytes of a row.
    k_gradient = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(logit_gradient), q)
    angles = load_angles(cos, sin, frame, HEAD_SIZE)
    raw = load_head(keys, source, None, TOKEN_STRIDE, HEAD_SIZE)
    k_gradient = rotate_back(scale_rows_apart(k_gradient, key_reciprocal), angles)
    if NORM and SMALL:
        k_gradient = subtract_rows(k_gradient, raw, along_keys)
    elif NORM:
        k_gradient = subtract_along(k_gradient, to_float32(raw), key_reciprocal, HEAD_SIZE)
    k_gradient = round_joined(k_gradient, dtype)
    store_head(gradients + HEADS * HEAD_SIZE, k_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if WITH_BIAS and not SMALL:
        sums = add_column_sums(sums, k_gradient, 1)
    q_gradient = add_product(zero_head(ROWS, HEAD_SIZE), logit_gradient, k)
    raw = load_head(queries, source, None, TOKEN_STRIDE, HEAD_SIZE)
    q_gradient = scale_rows_apart(q_gradient, query_reciprocal * SCALE)
    products, q_gradient = finish_queries(q_gradient, to_float32(raw), angles, factors)
    if WITH_WEIGHTS:
        sums = add_column_sums(sums, round_joined(products, dtype), 3)
    if NORM and SMALL:
        q_gradient = subtract_rows(q_gradient, raw, along_queries)
    elif NORM:
        q_gradient = subtract_along(q_gradient, to_float32(raw), query_reciprocal, HEAD_SIZE)
    q_gradient = round_joined(q_gradient, dtype)
    store_head(gradients, q_gradient, token, inside, TOKEN_STRIDE, HEAD_SIZE)
    if WITH_BIAS:
        sums = add_column_sums(sums, q_gradient, 0)
    if WITH_BIAS and SMALL:
        sums = add_column_sums(sums, k_gradient, 1)
        sums = add_column_sums(sums, g, 2)  # that of dV, as the probabilities of a query add up to one
    return sums


# Nothing is gained by knowing that the number of tiles is 1 or a multiple of 16, and each would be a build of its own.
@triton.jit(do_not_specialize=["num_tiles"])
def _backward(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    tiles,  # int32 [tiles, 4]
    num_tiles,
    output_gradient,  # [N, H, D]
    qkv_gradient,  # [N, 3, H, D] out
    partials,  # float32 [4, groups, H, D] out: of the biases of q, k, v, and of G; or None
    partials_stride,  # elements from one of the four to the next
    eps,
    WITH_WEIGHTS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = (program // HEADS * TILES).to(tl.int32)
    tensors = qkv, q_weight, k_weight, cos, sin, output_gradient, qkv_gradient
    head = program % HEADS
    sums = zero_sums(HEAD_SIZE)
    if TILES == 1:
        sums = _backward_tile(
            sums, tiles + first * 4, head, eps, *tensors, WITH_WEIGHTS, WITH_BIAS, HEADS, HEAD_SIZE, ROWS, EARLY
        )
    else:
        # What does not change from tile to tile is found again for each: kept in registers, it would spill.
        for number in tl.range(first, tl.minimum(first + TILES, num_tiles), disable_licm=True):
            sums = _backward_tile(
                sums, tiles + number * 4, head, eps, *tensors, WITH_WEIGHTS, WITH_BIAS, HEADS, HEAD_SIZE, ROWS, EARLY
            )
    if partials is not None:
        FIRST: tl.constexpr = 0 if WITH_BIAS else 3
        LAST: tl.constexpr = 3 if WITH_WEIGHTS else 2
        store_sums(partials + program * HEAD_SIZE, partials_stride, sums, FIRST, LAST, HEAD_SIZE)


def tiles_of_a_program(rows: int) -> int:
    """Small tiles come several to a program, one after another, so that it leaves one set of sums for 64 rows."""
    return 4 if rows == 16 else 1


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
    wants_bias: bool,
    wants_weights: bool,
    eps: float,
) -> None:
    """Writes `qkv_gradient` of the videos in `tiles` of so many rows, and the parts of the sums over tokens.

    Those are float32 `partials` [4, groups, H, D], one group for each `tiles_of_a_program`: of the gradients of the
    biases of q, k and v if wanted, and of G if wanted; None where neither is. All contiguous, but for the stride of the
    four.
    """
    heads, head_size = qkv.shape[2:]
    if not tiles.shape[0]:
        return
    launch(
        _backward,
        (ceil_divide(tiles.shape[0], tiles_of_a_program(rows)) * heads,),
        qkv,
        (
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            tiles,
            tiles.shape[0],
            output_gradient,
            qkv_gradient,
            partials,
            0 if partials is None else partials.stride(0),
            eps,
        ),
        {
            "WITH_WEIGHTS": wants_weights,
            "WITH_BIAS": wants_bias,
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "ROWS": rows,
            "TILES": tiles_of_a_program(rows),
            **select(CONFIGURATIONS, "temporal_attention_backward", f"{rows} rows", qkv.device).launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    return [_compile_case(arch, *build) for build in builds_of_tiles(arch)]


def _compile_case(arch: str, rows: int, dtype: str, with_norm: bool) -> CompileCase:
    absent = () if with_norm else ("q_weight", "k_weight")
    return attention_case(
        "temporal_attention_backward",
        _backward,
        candidates_of(CONFIGURATIONS, "temporal_attention_backward", f"{rows} rows", arch)[0],
        dtype,
        dict.fromkeys(absent)
        | {"WITH_WEIGHTS": with_norm, "WITH_BIAS": True, "ROWS": rows, "TILES": tiles_of_a_program(rows)},
        divisible_by_16=("partials_stride",),
        note=f"{rows} rows" if with_norm else f"{rows} rows; no norm",
        unit="element",
        work=rows * 72,
    )
