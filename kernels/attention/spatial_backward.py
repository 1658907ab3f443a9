"""Spatial attention, backward: launches its two kernels. The public function is in spatial_attention.

Two kernels, no atomics, each launched once for every one of the `shape_classes`. With g the output's gradient, P the
probabilities, δ = rowsum(g · output), W = q_weight · k_weight, q̂ = q · r_q and k̂ = k · r_k (r the reciprocal RMS),

    dS = P · (g · Vᵀ - δ)            gradient of the logits
    δ and dQ                         first, spatial_queries_backward
    dK and dV                        second, spatial_keys_backward
    d q̂ = W · (dS · k̂) / sqrt(D)     d k̂ = W · (dSᵀ · q̂) / sqrt(D), then the gradient of the RMS norm

Rows of dS sum to zero, but for the rounding of the output in δ. In half precision dS · k̂ is therefore computed as
dS · (k̂ - c), c a mean of a few keys, and δ is then corrected for dK: where all tokens of a frame are much alike, what
the rounding leaves of the sums would else outweigh the gradients.

The first kernel leaves the queries as the forward pass scaled and rounded them, q' = q̂ · W · log2(e) / sqrt(D), for
the second, which then needs no weights: d k̂ = dSᵀ · q' / log2(e). In longer frames it leaves a copy of the output's
gradient, too, and both are padded rows with a number beside each head (see `loops.is_folded`).

Both weights' gradients come from the one sum G = Σ (dS · k̂) · q̂ / sqrt(D) over all rows and heads, see
weight_gradients. Each program of the first kernel writes its part of G to a row of its own; the rows are summed
afterwards.

Per call: 14·S·H·D FLOPs (10 useful) and 28·H·D bytes (half precision) for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from .builds import attention_case
from .loops import NORM_DONE, NORM_LOADED, is_folded
from .spatial_forward import COMPILED, is_prepared, norm_of, shape_classes
from .spatial_keys_backward import CONFIGURATIONS as KEYS_CONFIGURATIONS
from .spatial_keys_backward import spatial_keys_backward
from .spatial_preparation import launch_preparation
from .spatial_queries_backward import CONFIGURATIONS as QUERIES_CONFIGURATIONS
from .spatial_queries_backward import spatial_queries_backward
from .tables import row_tiles
from .tiles import row_width

_TABLE = QUERIES_CONFIGURATIONS | KEYS_CONFIGURATIONS


def launch_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    qkv_gradient: Tensor,
    runs: list[int],
    eps: float,
) -> Tensor | None:
    """Fills the gradient of qkv [N, 3, H, D].

    Returns the parts of G, float32 [tiles, H, D]; None without QK-norm.

    All of [N, …] must be contiguous.
    """
    num_tokens, _, heads, head_size = qkv.shape
    device = qkv.device
    deltas = qkv.new_empty(heads, num_tokens, dtype=torch.float32)
    classes = shape_classes(qkv, runs)
    prepared = None
    if q_weight is not None and any(is_prepared(name) for name, _ in classes):
        prepared = launch_preparation(qkv, None, eps)

    norms = {name: norm_of(q_weight is not None, name, NORM_LOADED) for name, _ in classes}

    def plan(kernel: str) -> list[tuple[str, Configuration, Tensor]]:
        chosen = [(name, select(_TABLE, kernel, name, device), bounds) for name, bounds in classes]
        return [(name, found, row_tiles(tuple(runs), found["ROWS"], device, *bounds)) for name, found, bounds in chosen]

    # Of each class, as rows are of another width where scores are folded; only packs of several have more than one.
    left = {}

    def leave(shape_class: str) -> tuple[Tensor, Tensor]:
        """(queries, output gradient) as the first kernel leaves them for the second."""
        if q_weight is None:
            return qkv, output_gradient
        if not is_folded(norms[shape_class], head_size):
            return torch.empty_like(output), output_gradient
        rows = output.new_empty(2, num_tokens * heads * row_width(head_size))
        return rows[0], rows[1]

    planned = plan("spatial_attention_queries_backward")
    counts = [tiles.shape[0] for _, _, tiles in planned]
    partials, parts = None, [None] * len(counts)
    if q_weight is not None:
        partials = qkv.new_empty(sum(counts), heads, head_size, dtype=torch.float32)
        parts = partials.split(counts)
    for (shape_class, configuration, tiles), part in zip(planned, parts, strict=True):
        left[shape_class] = leave(shape_class)
        launch(
            spatial_queries_backward,
            (tiles.shape[0] * heads,),
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
                part,
                tiles,
                num_tokens,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NORM": norms[shape_class],
                **configuration.launch,
            },
        )
    for shape_class, configuration, tiles in plan("spatial_attention_keys_backward"):
        launch(
            spatial_keys_backward,
            (tiles.shape[0] * heads,),
            qkv,
            (
                qkv,
                prepared,
                *left[shape_class],
                statistics,
                deltas,
                qkv_gradient,
                tiles,
                num_tokens,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NORM": norms[shape_class],
                **configuration.launch,
            },
        )
    return partials


def compile_cases(arch: str) -> list[CompileCase]:
    cases = []
    for name, kernel in (
        ("spatial_attention_queries_backward", spatial_queries_backward),
        ("spatial_attention_keys_backward", spatial_keys_backward),
    ):
        for dtype, with_norm, shape_class in COMPILED:
            norm = norm_of(with_norm, shape_class, NORM_LOADED)
            configuration = candidates_of(_TABLE, name, shape_class, arch)[0]
            absent = [] if norm == NORM_DONE.value else ["prepared"]
            if kernel is spatial_queries_backward and not with_norm:
                absent += ["q_weight", "k_weight", "weight_partials"]
            cases.append(
                attention_case(
                    name,
                    kernel,
                    configuration,
                    dtype,
                    dict.fromkeys(absent) | {"NORM": norm},
                    work=configuration["ROWS"] * configuration["STEP"],
                    note=f"{'QK-norm' if with_norm else 'no norm'}; {shape_class} frames",
                )
            )
    return cases
