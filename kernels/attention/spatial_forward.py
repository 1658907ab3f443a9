"""Triton kernel of spatial attention, forward. The formulas and the public function are in spatial_attention.

One program computes ROWS queries of one head of one frame; all frames of one of the `shape_classes` share a launch.
With W = q_weight · k_weight, r = reciprocal RMS and c = log2(e) / sqrt(D), the score of base 2 is

    score[i, j] = Σ_d (q[i, d] · r_q[i] · W[d] · c) · (k[j, d] · r_k[j])

where the first bracket is one tile rounded once to the input's dtype. In small frames k goes to the matrix units
unchanged and r_k[j] is a factor on a column; for longer ones spatial_preparation norms the keys beforehand,
and copies them and the values to where they can be read fast. As |score| is at most c · D · max|W|, a small enough
bound, known from the weights alone, allows exp2 without a running maximum; all programs of a launch take the same
branch.

Per call: 4·S·H·D FLOPs and 8·H·D bytes (half precision) for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from .builds import attention_case
from .loops import NO_NORM, NORM_COMPUTED, NORM_DONE, attend
from .spatial_preparation import launch_preparation, place_of_keys_and_values
from .tables import row_tiles
from .tiles import (
    BOUNDED_UP_TO,
    LOG2_E,
    fold_query,
    load_head,
    load_tile,
    load_weight_product,
    reciprocal_rms,
    store_head,
)

# The longest frames of the classes "small" and "medium"; longer ones are "large". Small frames find the norm of the
# keys on their way. For longer ones, which pass over keys and values more often, these are prepared once: that was 16 %
# slower at 144 tokens and 7 % faster at 405 [measured on an H200; not between]. Medium ones take tiles of fewer rows.
LONGEST_SMALL_FRAME, LONGEST_MEDIUM_FRAME = 256, 1024

CONFIGURATIONS = {
    "spatial_attention_forward": {
        "small": (  # 128 registers a thread: four programs of four warps fit on a multiprocessor; with 168 three
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=128, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=255, num_warps=4, num_stages=3),
            Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=3),
            Configuration(ROWS=64, STEP=128, REMAINDER=16, maxnreg=255, num_warps=4, num_stages=2),
        ),
        "small@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=255, num_warps=4, num_stages=2),),
        "medium": (
            Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=128, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=128, num_warps=4, num_stages=3),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, maxnreg=128, num_warps=8, num_stages=3),
        ),
        "medium@sm_80": (Configuration(ROWS=128, STEP=64, REMAINDER=16, maxnreg=255, num_warps=8, num_stages=3),),
        # 128 rows: 64 would read keys and values at the limit of the shared memory. 128 registers: sixteen warps fit.
        "large": (
            Configuration(ROWS=128, STEP=64, REMAINDER=32, maxnreg=128, num_warps=8, num_stages=3),
            Configuration(ROWS=128, STEP=64, REMAINDER=16, maxnreg=128, num_warps=8, num_stages=3),
            Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=128, num_warps=4, num_stages=3),
        ),
        "large@sm_80": (
            Configuration(ROWS=128, STEP=64, REMAINDER=16, maxnreg=255, num_warps=8, num_stages=3),
            Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=255, num_warps=4, num_stages=3),
        ),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, maxnreg=255, num_warps=8, num_stages=1),),
        "float32@sm_100": (Configuration(ROWS=16, STEP=16, REMAINDER=16, maxnreg=255, num_warps=8, num_stages=1),),
    },
}


def shape_classes(tensor: Tensor, runs: Sequence[int]) -> list[tuple[str, tuple[int, int]]]:
    """The shape classes that occur in a pack, each with the shortest and the longest frame that belong to it.

    float32 on a GPU is a class of its own: it multiplies outside the matrix units, with tiles to suit.
    """
    outside_matrix_units = tensor.is_cuda and tensor.dtype == torch.float32
    return _shape_classes(outside_matrix_units, tuple(runs[1::2]), LONGEST_SMALL_FRAME, LONGEST_MEDIUM_FRAME)


@lru_cache(maxsize=1024)
def _shape_classes(
    outside_matrix_units: bool, lengths: tuple[int, ...], longest_small: int, longest_medium: int
) -> list[tuple[str, tuple[int, int]]]:
    bounds = {
        "small": (0, longest_small),
        "medium": (longest_small + 1, longest_medium),
        "large": (longest_medium + 1, 2**31),
    }
    if outside_matrix_units:
        bounds = {"float32": (0, 2**31)}
    return [
        (name, (shortest, longest))
        for name, (shortest, longest) in bounds.items()
        if any(shortest <= length <= longest for length in lengths)
    ]


def is_prepared(shape_class: str) -> bool:
    """Whether a kernel prepares keys and values of frames of this class, where there is a QK-norm."""
    return shape_class in ("medium", "large")


def norm_of(with_norm: bool, shape_class: str, unprepared: tl.constexpr) -> int:
    """How a kernel finds the keys of a class normed, as `loops` says; `unprepared`: where no kernel prepares them."""
    norm = NO_NORM if not with_norm else NORM_DONE if is_prepared(shape_class) else unprepared
    return norm.value


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    qkv,  # [N, 3, H, D]
    prepared,  # of spatial_preparation, or None
    q_weight,  # [D] or None
    k_weight,
    output,  # [N, H, D] out
    statistics,  # float32 [1 or 3, H, N] out
    tiles,  # int32 [tiles, 4]
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
    BOUNDED_LIMIT: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    OUTPUT_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    KEY_STRIDE: tl.constexpr = OUTPUT_STRIDE if NORM == NORM_DONE else TOKEN_STRIDE
    SCALE: tl.constexpr = LOG2_E / HEAD_SIZE**0.5
    head, first_token, length, first_row = load_tile(tiles, HEADS)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    frame = qkv + first_token * TOKEN_STRIDE + head * HEAD_SIZE
    keys, values = place_of_keys_and_values(qkv, prepared, head, num_tokens, first_token, NORM, HEADS, HEAD_SIZE)
    key_factors = statistics + (2 * HEADS + head) * num_tokens + first_token
    keep_factors = first_row == 0  # the first tile of a frame writes down the norm of its keys

    q = load_head(frame, rows, inside, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    bound = float("inf")
    if NORM != NO_NORM:
        factors = reciprocal_rms(q, eps, HEAD_SIZE)
        query_factors = statistics + (HEADS + head) * num_tokens + first_token
        tl.store(query_factors + rows, factors, mask=inside)
        weight = load_weight_product(q_weight, k_weight, HEAD_SIZE)
        q = fold_query(q, factors * SCALE, weight)
        bound = tl.maximum(tl.max(tl.abs(weight[0])), tl.max(tl.abs(weight[1]))) * (HEAD_SIZE * SCALE)

    if NORM != NO_NORM and bound <= BOUNDED_LIMIT:
        result, log_sum = attend(
            q,
            keys,
            values,
            key_factors,
            keep_factors,
            length,
            eps,
            STEP=STEP,
            REMAINDER=REMAINDER,
            NORM=NORM,
            SCALE=SCALE if NORM == NO_NORM else 1.0,
            BOUNDED=True,
            KEY_STRIDE=KEY_STRIDE,
            VALUE_STRIDE=TOKEN_STRIDE,
            HEAD_SIZE=HEAD_SIZE,
        )
    else:
        result, log_sum = attend(
            q,
            keys,
            values,
            key_factors,
            keep_factors,
            length,
            eps,
            STEP=STEP if NORM == NO_NORM or STEP < 32 else STEP // 2,  # seldom taken, it must not decide over registers
            REMAINDER=REMAINDER,
            NORM=NORM,
            SCALE=SCALE if NORM == NO_NORM else 1.0,
            BOUNDED=False,
            KEY_STRIDE=KEY_STRIDE,
            VALUE_STRIDE=TOKEN_STRIDE,
            HEAD_SIZE=HEAD_SIZE,
        )
    head, first_token, length, first_row = load_tile(tiles, HEADS, AGAIN=True)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    tl.store(statistics + head * num_tokens + first_token + rows, log_sum, mask=inside)
    in_output = first_token * OUTPUT_STRIDE + head * HEAD_SIZE
    store_head(output + in_output, result, rows, inside, OUTPUT_STRIDE, HEAD_SIZE)


def launch_forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    runs: list[int],
    eps: float,
) -> None:
    """Fills output [N, H, D] and statistics float32 [1 or 3, H, N], which the backward pass needs.

    statistics[0] is log2 of the sum of exp2(scores); with QK-norm, [1] and [2] are the reciprocal RMS of q and k.
    `qkv` [N, 3, H, D] must be contiguous.
    """
    num_tokens, _, heads, head_size = qkv.shape
    classes = shape_classes(qkv, runs)
    prepared = None
    if q_weight is not None and any(is_prepared(name) for name, _ in classes):
        prepared = launch_preparation(qkv, statistics, eps)
    for shape_class, bounds in classes:
        configuration = select(CONFIGURATIONS, "spatial_attention_forward", shape_class, qkv.device)
        tiles = row_tiles(tuple(runs), configuration["ROWS"], qkv.device, *bounds)
        launch(
            _forward,
            (tiles.shape[0] * heads,),
            qkv,
            (
                qkv,
                prepared,
                q_weight,
                k_weight,
                output,
                statistics,
                tiles,
                num_tokens,
                eps,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NORM": norm_of(q_weight is not None, shape_class, NORM_COMPUTED),
                "BOUNDED_LIMIT": BOUNDED_UP_TO[qkv.dtype],
                **configuration.launch,
            },
        )


COMPILED = (  # dtype, whether with QK-norm, shape class
    ("bf16", True, "small"),
    ("bf16", True, "medium"),
    ("bf16", True, "large"),
    ("bf16", False, "small"),
    ("fp16", True, "small"),
    ("fp32", True, "float32"),
)


def compile_cases(arch: str) -> list[CompileCase]:
    cases = []
    for dtype, with_norm, shape_class in COMPILED:
        configuration = candidates_of(CONFIGURATIONS, "spatial_attention_forward", shape_class, arch)[0]
        norm = norm_of(with_norm, shape_class, NORM_COMPUTED)
        absent = (() if norm == NORM_DONE.value else ("prepared",)) + (() if with_norm else ("q_weight", "k_weight"))
        cases.append(
            attention_case(
                "spatial_attention_forward",
                _forward,
                configuration,
                dtype,
                dict.fromkeys(absent)
                | {"NORM": norm, "BOUNDED_LIMIT": BOUNDED_UP_TO[torch.float16 if dtype == "fp16" else torch.float32]},
                work=configuration["ROWS"] * configuration["STEP"],
                note=f"{'QK-norm' if with_norm else 'no norm'}; {shape_class} frames",
            )
        )
    return cases
