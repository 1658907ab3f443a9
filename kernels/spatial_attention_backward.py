"""Triton kernels of spatial attention, backward. The formulas and the public function are in spatial_attention.

Two kernels, no atomics, each launched once for every one of the `shape_classes`. With g the output's gradient, P the
probabilities, δ = rowsum(g · output), W = q_weight · k_weight, q̂ = q · r_q and k̂ = k · r_k (r the reciprocal RMS),

    dS = P · (g · Vᵀ - δ)            gradient of the logits
    queries (first): δ and dQ        one program per tile of queries and head, looping over the frame's keys
    keys (second):   dK and dV       one program per tile of keys and head, looping over the frame's queries
    d q̂ = W · (dS · k̂) / sqrt(D)     d k̂ = W · (dSᵀ · q̂) / sqrt(D), then the gradient of the RMS norm

The first kernel leaves the queries as the forward pass scaled and rounded them, q' = q̂ · W · log2(e) / sqrt(D), for
the second, which then needs no weights: d k̂ = dSᵀ · q' / log2(e). In longer frames it leaves a copy of the output's
gradient, too, and both are padded rows with a number beside each head (see `attention_loops.is_folded`).

Both weights' gradients come from the one sum G = Σ (dS · k̂) · q̂ / sqrt(D) over all rows: dq_weight = k_weight · G,
dk_weight = q_weight · G. Each program of the first kernel writes its part of G to a row of its own; the rows are summed
afterwards.

Per call: 14·S·H·D FLOPs (10 useful) and 28·H·D bytes (half precision) for each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_loops import NO_NORM, NORM_DONE, NORM_LOADED, is_folded, key_gradient, query_gradient
from .attention_tables import row_tiles
from .attention_tiles import (
    append_number,
    fold_query,
    load_head,
    load_tile,
    load_weight_product,
    multiply,
    padded_rows,
    rms_norm_gradient,
    row_products,
    row_width,
    scale_rows,
    store_column_sums,
    store_head,
    store_vector,
    to_float32,
)
from .bias_gradient import BiasPartials
from .configurations import CompileCase, Configuration, candidates_of, select
from .launch import launch
from .spatial_attention_forward import COMPILED, is_prepared, shape_classes
from .spatial_attention_preparation import launch_preparation, padded_values, place_of_keys_and_values

CONFIGURATIONS = {
    "spatial_attention_queries_backward": {
        "small": (
            # One or two warps hardly wait for each other; those of the second spill a little, and were faster still.
            Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=2, num_stages=2),
            Configuration(ROWS=32, STEP=32, REMAINDER=16, num_warps=1, num_stages=2),
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
            Configuration(ROWS=128, STEP=128, REMAINDER=32, num_warps=8, num_stages=3),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=3),
        ),
        # Steps of 128 need more tensor memory than there is, and the build is a kernel that only traps.
        "large@sm_100": (Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),),
        "large@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, num_warps=8, num_stages=1),),
    },
    "spatial_attention_keys_backward": {
        "small": (
            Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=3),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=168, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, num_warps=4, num_stages=2),
        ),
        "small@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=2),),
        "medium": (
            Configuration(ROWS=64, STEP=32, REMAINDER=32, maxnreg=168, num_warps=4, num_stages=3),
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
def _queries(
    qkv,  # [N, 3, H, D]
    prepared,  # of spatial_attention_preparation, or None
    q_weight,  # [D] or None
    k_weight,
    output,  # [N, H, D]
    output_gradient,  # [N, H, D]
    statistics,  # float32 [1 or 3, H, N]
    deltas,  # float32 [H, N] out: δ
    scaled_queries,  # out, with QK-norm: q', [N, H, D] or padded rows
    padded_gradient,  # out, where scores are folded: padded rows
    qkv_gradient,  # [N, 3, H, D] out: the queries
    weight_partials,  # float32 [tiles · H, D] out, with QK-norm: parts of G
    bias_partials,  # float32 [tiles · H, D] out, or None
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
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    LOG2_E: tl.constexpr = 1.4426950408889634
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, length, first_row, _ = load_tile(tiles, HEADS)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length

    frame = qkv + first_token * TOKEN_STRIDE + head * HEAD_SIZE
    in_output = first_token * OUTPUT_STRIDE + head * HEAD_SIZE
    in_statistics = head * num_tokens + first_token
    g = load_head(output_gradient + in_output, rows, inside, OUTPUT_STRIDE, HEAD_SIZE)  # [ROWS, D]
    delta = row_products(load_head(output + in_output, rows, inside, OUTPUT_STRIDE, HEAD_SIZE), g)
    tl.store(deltas + in_statistics + rows, delta, mask=inside)
    log_sum = tl.load(statistics + in_statistics + rows, mask=inside, other=0.0 if FOLDED else float("inf"))
    keys, values = place_of_keys_and_values(qkv, prepared, head, num_tokens, first_token, NORM, HEADS, HEAD_SIZE)
    if FOLDED:
        left_queries = padded_rows(scaled_queries, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        g = append_number(g, -delta, HEAD_SIZE)
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
    sums = query_gradient(
        q,
        g,
        log_sum,
        delta,
        keys,
        values,
        statistics + 2 * HEADS * num_tokens + in_statistics,
        length,
        ROWS=ROWS,
        STEP=STEP,
        REMAINDER=REMAINDER,
        NORM=NORM,
        SCALE=SCALE * LOG2_E if NORM == NO_NORM else 1.0,
        KEY_STRIDE=OUTPUT_STRIDE if NORM == NORM_DONE else TOKEN_STRIDE,
        VALUE_STRIDE=TOKEN_STRIDE,
        HEAD_SIZE=HEAD_SIZE,
    )
    # Read again what the loop did not need, so that it does not occupy registers there.
    head, first_token, length, first_row, _ = load_tile(tiles, HEADS, AGAIN=True)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    scale = tl.where(length > 1, SCALE, 0.0)  # a lone key has probability one: nothing moves it
    sums = sums[0] * scale, sums[1] * scale  # dS · k̂ / sqrt(D)
    if NORM != NO_NORM:
        query_factors = statistics + (HEADS + head) * num_tokens + first_token + rows
        factors = tl.load(query_factors, mask=inside, other=0.0, cache_modifier=".ca")
        frame = qkv + first_token * TOKEN_STRIDE + head * HEAD_SIZE
        normed = scale_rows(to_float32(load_head(frame, rows, inside, TOKEN_STRIDE, HEAD_SIZE)), factors)  # q̂
        partial = multiply(sums, normed)  # rows outside the frame are zero
        partial = tl.sum(partial[0], axis=0), tl.sum(partial[1], axis=0)
        store_vector(weight_partials + tl.program_id(0).to(tl.int64) * HEAD_SIZE, partial, HEAD_SIZE)
        sums = multiply(sums, load_weight_product(q_weight, k_weight, HEAD_SIZE, AGAIN=True))
        sums = rms_norm_gradient(sums, normed, factors, HEAD_SIZE)
    # Before the gradient is stored: the other way round Triton 3.6 spills 24 bytes on sm_90.
    if bias_partials is not None:
        store_column_sums(bias_partials, sums, inside, HEAD_SIZE)
    gradient = qkv_gradient + first_token * TOKEN_STRIDE + head * HEAD_SIZE
    store_head(gradient, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_tokens"])
def _keys(
    qkv,  # [N, 3, H, D]
    prepared,  # of spatial_attention_preparation, or None
    queries,  # as the first kernel leaves them
    output_gradient,  # likewise
    statistics,  # float32 [1 or 3, H, N]
    deltas,  # float32 [H, N]
    qkv_gradient,  # [N, 3, H, D] out: keys and values
    key_bias_partials,  # float32 [tiles · H, D] out, or None
    value_bias_partials,
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
    LOG2_E: tl.constexpr = 1.4426950408889634
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, length, first_row, _ = load_tile(tiles, HEADS)
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
    key_sums, value_sums = key_gradient(
        k,
        v,
        factors,
        streamed_queries,
        gradients,
        statistics + in_statistics,
        deltas + in_statistics,
        length,
        ROWS=ROWS,
        STEP=STEP,
        REMAINDER=REMAINDER,
        NORM=NORM,
        SCALE=SCALE * LOG2_E if NORM == NO_NORM else 1.0,
        QUERY_STRIDE=QUERY_STRIDE,
        GRADIENT_STRIDE=OUTPUT_STRIDE,
        HEAD_SIZE=HEAD_SIZE,
    )
    head, first_token, length, first_row, _ = load_tile(tiles, HEADS, AGAIN=True)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    gradient = qkv_gradient + first_token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
    store_head(gradient + HEADS * HEAD_SIZE, value_sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
    if value_bias_partials is not None:
        store_column_sums(value_bias_partials, value_sums, inside, HEAD_SIZE)
    scale = tl.where(length > 1, SCALE if NORM == NO_NORM else 1.0 / LOG2_E, 0.0)
    sums = key_sums[0] * scale, key_sums[1] * scale
    if NORM != NO_NORM:
        keys = qkv + first_token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
        key_factors = statistics + (2 * HEADS + head) * num_tokens + first_token + rows
        factors = tl.load(key_factors, mask=inside, other=0.0, cache_modifier=".ca")
        normed = scale_rows(to_float32(load_head(keys, rows, inside, TOKEN_STRIDE, HEAD_SIZE)), factors)  # k̂
        sums = rms_norm_gradient(sums, normed, factors, HEAD_SIZE)
    store_head(gradient, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
    if key_bias_partials is not None:
        store_column_sums(key_bias_partials, sums, inside, HEAD_SIZE)


def launch_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    qkv_gradient: Tensor,
    bias_gradient: Tensor | None,
    runs: list[int],
    eps: float,
) -> Tensor:
    """Fills the gradients of qkv [N, 3, H, D] and of its bias [3, H, D] (None where it is not wanted).

    Returns G [D] float32 of the module's docstring (empty without QK-norm).

    All of [N, …] must be contiguous.
    """
    num_tokens, _, heads, head_size = qkv.shape
    device = qkv.device
    deltas = qkv.new_empty(heads, num_tokens, dtype=torch.float32)
    partials = []
    classes = shape_classes(qkv, runs)
    prepared = None
    if q_weight is not None and any(is_prepared(name) for name, _ in classes):
        prepared = launch_preparation(qkv, statistics, eps)

    def norm_of(shape_class: str) -> int:
        norm = NO_NORM if q_weight is None else NORM_DONE if is_prepared(shape_class) else NORM_LOADED
        return norm.value

    def plan(kernel: str) -> list[tuple[str, Configuration, Tensor]]:
        chosen = [(name, select(CONFIGURATIONS, kernel, name, device), bounds) for name, bounds in classes]
        return [(name, found, row_tiles(tuple(runs), found["ROWS"], device, *bounds)) for name, found, bounds in chosen]

    # Of each class, as rows are of another width where scores are folded; only packs of several have more than one.
    left = {}

    def leave(shape_class: str) -> tuple[Tensor, Tensor]:
        """(queries, output gradient) as the first kernel leaves them for the second."""
        if q_weight is None:
            return qkv, output_gradient
        if not is_folded(norm_of(shape_class), head_size):
            return torch.empty_like(output), output_gradient
        rows = output.new_empty(2, num_tokens * heads * row_width(head_size))
        return rows[0], rows[1]

    launches = plan("spatial_attention_queries_backward")
    bias_partials = BiasPartials(bias_gradient, 1, sum(tiles.shape[0] for *_, tiles in launches))
    for shape_class, configuration, tiles in launches:
        programs = tiles.shape[0] * heads
        left[shape_class] = leave(shape_class)
        partials.append(qkv.new_empty(0 if q_weight is None else programs, head_size, dtype=torch.float32))
        launch(
            _queries,
            (programs,),
            qkv,
            (
                qkv,
                prepared,
                q_weight,
                k_weight,
                output,
                output_gradient,
                statistics,
                deltas,
                *left[shape_class],
                qkv_gradient,
                partials[-1],
                bias_partials.take(tiles.shape[0])[0],
                tiles,
                num_tokens,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NORM": norm_of(shape_class),
                **configuration.launch,
            },
        )
    if bias_gradient is not None:
        bias_partials.add_up(bias_gradient[:1])
    launches = plan("spatial_attention_keys_backward")
    bias_partials = BiasPartials(bias_gradient, 2, sum(tiles.shape[0] for *_, tiles in launches))
    for shape_class, configuration, tiles in launches:
        launch(
            _keys,
            (tiles.shape[0] * heads,),
            qkv,
            (
                qkv,
                prepared,
                *left[shape_class],
                statistics,
                deltas,
                qkv_gradient,
                *bias_partials.take(tiles.shape[0])[:2],
                tiles,
                num_tokens,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NORM": norm_of(shape_class),
                **configuration.launch,
            },
        )
    if bias_gradient is not None:
        bias_partials.add_up(bias_gradient[1:])
    if q_weight is None:
        return partials[0]
    return (partials[0] if len(partials) == 1 else torch.cat(partials)).sum(dim=0)


def compile_cases(arch: str) -> list[CompileCase]:
    cases = []
    types = ("qkv", "prepared", "q_weight", "k_weight", "output", "output_gradient", "scaled_queries", "queries")
    types += ("padded_gradient", "qkv_gradient")
    tables = {
        "statistics": "*fp32",
        "deltas": "*fp32",
        "weight_partials": "*fp32",
        "bias_partials": "*fp32",
        "key_bias_partials": "*fp32",
        "value_bias_partials": "*fp32",
        "tiles": "*i32",
        "num_tokens": "i32",
    }
    for name, kernel in (
        ("spatial_attention_queries_backward", _queries),
        ("spatial_attention_keys_backward", _keys),
    ):
        for dtype, with_norm, shape_class in COMPILED:
            signature = {argument: f"*{dtype}" for argument in types} | tables
            norm = NO_NORM if not with_norm else NORM_DONE if is_prepared(shape_class) else NORM_LOADED
            configuration = candidates_of(CONFIGURATIONS, name, shape_class, arch)[0]
            absent = [] if norm == NORM_DONE else ["prepared"]
            if kernel is _queries and not with_norm:
                absent += ["q_weight", "k_weight"]
            cases.append(
                CompileCase(
                    name=name,
                    kernel=kernel,
                    signature={key: value for key, value in signature.items() if key in kernel.arg_names},
                    constants=dict.fromkeys(absent) | {"HEADS": 16, "HEAD_SIZE": 72, "NORM": norm.value},
                    configuration=configuration,
                    dtype=dtype,
                    attention=dtype != "fp32",
                    unit="score",
                    work=configuration["ROWS"] * configuration["STEP"],
                    note=f"{'QK-norm' if with_norm else 'no norm'}; {shape_class} frames",
                )
            )
    return cases
