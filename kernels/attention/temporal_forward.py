"""Triton kernel of temporal attention, forward, for videos whose frames fit into one tile of up to 128 rows.

One program computes one head of as many whole places as fit into the tile (T = 5: 3 places in 16 rows). Rows are read
where qkv has them, a mask keeps the places of a tile apart, and all T keys are at hand, so the softmax is the ordinary
one in one pass. Images (T = 1) read v only: their output is v, their probabilities are one. Heads are fastest in the
grid: neighbours read neighbouring bytes of the same rows.

Bytes for each token: 8·H·D (half precision; images 4·H·D), the least possible. FLOPs for each token: 4·T·H·D useful,
4·ROWS·H·D done.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from .builds import attention_case
from .rotary_tiles import load_angles, round_joined
from .temporal_tiles import builds_of_tiles, normed_rows, place_rows, query_factors
from .tiles import (
    LOG2_E,
    add_product,
    dot_rows,
    load_head,
    multiply,
    scale_rows,
    store_head,
    zero_head,
)

CONFIGURATIONS = {
    "temporal_attention_forward": {
        # One warp needs no barriers and no shared memory to agree with others about a row.
        "16 rows": (
            Configuration(num_warps=1, num_stages=1),
            Configuration(num_warps=1, num_stages=1, maxnreg=128),
            Configuration(num_warps=2, num_stages=1),
        ),
        "32 rows": (
            Configuration(num_warps=2, num_stages=1),
            Configuration(num_warps=1, num_stages=1),
        ),
        "64 rows": (
            Configuration(num_warps=4, num_stages=1, maxnreg=128),
            Configuration(num_warps=4, num_stages=1),
            Configuration(num_warps=8, num_stages=1),
        ),
        "128 rows": (
            Configuration(num_warps=8, num_stages=1, maxnreg=128),
            Configuration(num_warps=8, num_stages=1),
            Configuration(num_warps=4, num_stages=1),
        ),
    },
}


@triton.jit
def _forward(
    qkv,  # [N, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2]
    sin,
    tiles,  # int32 [tiles, 4]
    output,  # [N, H, D]
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    LOG2_SCALE: tl.constexpr = LOG2_E / HEAD_SIZE**0.5
    NORM: tl.constexpr = q_weight is not None
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program // HEADS * 4
    queries = qkv + program % HEADS * HEAD_SIZE
    token, frame, place, inside, source = place_rows(tile, ROWS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    angles = load_angles(cos, sin, frame, HEAD_SIZE)

    # One after the other, so that no two float32 tiles occupy registers at a time.
    k = load_head(queries + HEADS * HEAD_SIZE, source, None, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    k, _ = normed_rows(k, angles, eps, NORM, HEAD_SIZE)
    k = round_joined(k, dtype)
    q = load_head(queries, source, None, TOKEN_STRIDE, HEAD_SIZE)
    q, _ = normed_rows(q, angles, eps, NORM, HEAD_SIZE)
    q = round_joined(multiply(q, query_factors(q_weight, k_weight, LOG2_SCALE, NORM, HEAD_SIZE)), dtype)
    # Rows beyond the last place meet only their own kind, so that every row has a finite softmax.
    scores = tl.where(place[:, None] == place[None, :], dot_rows(q, k), float("-inf"))  # [ROWS, ROWS]
    probabilities = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    factors = 1.0 / tl.sum(probabilities, axis=1)
    # The rows again, so that sixteen warps fit on a multiprocessor: kept all along, they cost more than 128 registers.
    token, _, _, inside, _ = place_rows(tile, ROWS, AGAIN=True)
    v = load_head(queries + 2 * HEADS * HEAD_SIZE, token, None, TOKEN_STRIDE, HEAD_SIZE)
    sums = add_product(zero_head(ROWS, HEAD_SIZE), probabilities.to(dtype), v)
    result = output + program % HEADS * HEAD_SIZE
    store_head(result, scale_rows(sums, factors), token, inside, HEADS * HEAD_SIZE, HEAD_SIZE)


def launch_forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tiles: Tensor,
    rows: int,
    output: Tensor,
    eps: float,
) -> None:
    """Writes `output` [N, H, D] of the videos in `tiles` of so many rows. All contiguous."""
    heads, head_size = qkv.shape[2:]
    if not tiles.shape[0]:
        return
    launch(
        _forward,
        (tiles.shape[0] * heads,),
        qkv,
        (
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            tiles,
            output,
            eps,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "ROWS": rows,
            **select(CONFIGURATIONS, "temporal_attention_forward", f"{rows} rows", qkv.device).launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    return [_compile_case(arch, *build) for build in builds_of_tiles(arch)]


def _compile_case(arch: str, rows: int, dtype: str, with_norm: bool) -> CompileCase:
    absent = () if with_norm else ("q_weight", "k_weight")
    return attention_case(
        "temporal_attention_forward",
        _forward,
        candidates_of(CONFIGURATIONS, "temporal_attention_forward", f"{rows} rows", arch)[0],
        dtype,
        dict.fromkeys(absent) | {"ROWS": rows},
        note=f"{rows} rows" if with_norm else f"{rows} rows; no norm",
        unit="element",
        work=rows * 72,
    )
