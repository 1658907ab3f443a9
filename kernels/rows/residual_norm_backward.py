"""The Triton backward of `modulated_norm`, `gate_residual` and `gate_residual_modulated_norm`.

    g = d_normed · (1 + scale[row])
    d = d_residual + rstd · (g - mean_C(g) - x̂ · mean_C(g · x̂))
    d_x = d                                    d_branch = gate[row] · d
    d_shift[row] = Σ d_normed                  d_scale[row] = Σ d_normed · x̂
    d_gate[row] = Σ d · (branch + bias)        d_bias = Σ d_branch

Both gradients of the fused op go in and all of its gradients come out in one pass. x̂ is computed again from the
residual, mean and rstd. As in the forward, an argument that is None leaves its part out. A program's sums over the
tokens of its tile stay in registers until the tile ends and go to `partials [sums, tiles, C]`, which `sum_tiles` adds
up in a fixed order: no atomics, and equal bits every time.

Bytes a token in rows of C bf16 values: modulated_norm 3, gate_residual 3 (d_x is d_residual itself), the fused op 6, or
4 without a gate (d_branch is d_x itself). Writing and reading s float32 sums of a tile of t tokens adds 4·s/t: 0.25 at
s = 4, t = 64, of which the L2 cache keeps most.

Letters: N tokens, C channels, F frames, R rows of the modulation tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, candidates_of, select
from ..launch import launch
from ..registration import contiguous
from .residual_norm_forward import dense_rows, fold_row, load_row, row_stride
from .residual_norm_tiles import (
    COMPILED,
    CONFIGURATIONS,
    split_columns,
)
from .tile_sums import launch_sum_tiles


@triton.jit
def _store_sums(partials, index, tile, num_tiles, wide, tail, in_tail, sum_wide, sum_tail, C: tl.constexpr):
    row = (index * num_tiles + tile).to(tl.int64) * C
    tl.store(partials + row + wide, sum_wide)
    tl.store(partials + row + tail, sum_tail, mask=in_tail)


@triton.jit
def residual_norm_backward(
    d_residual,  # [N, C] or None
    d_normed,  # [N, C] or None
    residual,  # [N, C] or None: the norm's input
    mean,  # float32 [N] or None
    rstd,  # float32 [N] or None
    scale,  # [R, C] or None
    branch,  # [N, C] or None where the gradient of the gate is not wanted
    gate,  # [R, C] or None
    bias,  # [C] or None
    d_x,  # [N, C] out, or None
    d_branch,  # [N, C] out, or None
    partials,  # float32 [sums, tiles, C] out, or None: shift, scale, gate, bias, those that are wanted
    frame_rows,  # int32 [F]
    tiles,  # int32 [tiles, 3]
    scale_stride,
    gate_stride,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
    THREADS: tl.constexpr,
    WANTS_TABLES: tl.constexpr,
    WANTS_GATE: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    first = tl.load(tiles + 3 * tile).to(tl.int64)
    count = tl.load(tiles + 3 * tile + 1)
    entry = tl.load(frame_rows + tl.load(tiles + 3 * tile + 2)).to(tl.int64)
    wide, tail = tl.arange(0, WIDE), WIDE + tl.arange(0, TAIL)
    in_wide, in_tail = wide < C, tail < C
    scale_wide = load_row(scale, entry * scale_stride, wide, in_wide)
    scale_tail = load_row(scale, entry * scale_stride, tail, in_tail)
    gate_wide = load_row(gate, entry * gate_stride, wide, in_wide)
    gate_tail = load_row(gate, entry * gate_stride, tail, in_tail)
    bias_wide, bias_tail = load_row(bias, 0, wide, in_wide), load_row(bias, 0, tail, in_tail)
    shift_sum_wide, shift_sum_tail = tl.zeros([WIDE], tl.float32), tl.zeros([TAIL], tl.float32)
    scale_sum_wide, scale_sum_tail = tl.zeros([WIDE], tl.float32), tl.zeros([TAIL], tl.float32)
    gate_sum_wide, gate_sum_tail = tl.zeros([WIDE], tl.float32), tl.zeros([TAIL], tl.float32)
    bias_sum_wide, bias_sum_tail = tl.zeros([WIDE], tl.float32), tl.zeros([TAIL], tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        token = first + step
        row = token * C
        if d_normed is None:
            d_wide = load_row(d_residual, row, wide, in_wide)
            d_tail = load_row(d_residual, row, tail, in_tail)
        else:
            average, scaling = tl.load(mean + token), tl.load(rstd + token)
            out_wide = load_row(d_normed, row, wide, in_wide)
            out_tail = load_row(d_normed, row, tail, in_tail)
            unit_wide = (load_row(residual, row, wide, in_wide) - average) * scaling
            unit_tail = (load_row(residual, row, tail, in_tail) - average) * scaling
            if WANTS_TABLES:
                shift_sum_wide += out_wide
                shift_sum_tail += out_tail
                scale_sum_wide += out_wide * unit_wide
                scale_sum_tail += out_tail * unit_tail
            out_wide *= 1.0 + scale_wide
            out_tail *= 1.0 + scale_tail
            BYTES: tl.constexpr = residual.dtype.element_ty.primitive_bitwidth // 8
            plain = fold_row(out_wide, out_tail, WIDE, TAIL, THREADS, BYTES)
            along = fold_row(out_wide * unit_wide, out_tail * unit_tail, WIDE, TAIL, THREADS, BYTES)
            # Both at once: two reductions wait at twice as many barriers.
            plain, along = tl.split(tl.sum(tl.join(plain, along), axis=0) / C)
            d_wide = scaling * (out_wide - plain - unit_wide * along)
            d_tail = scaling * (out_tail - plain - unit_tail * along)
            if d_residual is not None:
                d_wide += load_row(d_residual, row, wide, in_wide)
                d_tail += load_row(d_residual, row, tail, in_tail)
        if d_x is not None:
            tl.store(d_x + row + wide, d_wide, mask=in_wide)
            tl.store(d_x + row + tail, d_tail, mask=in_tail)
        if WANTS_GATE:
            branch_wide = load_row(branch, row, wide, in_wide) + bias_wide
            branch_tail = load_row(branch, row, tail, in_tail) + bias_tail
            gate_sum_wide += d_wide * branch_wide
            gate_sum_tail += d_tail * branch_tail
        if gate is not None:
            d_wide *= gate_wide
            d_tail *= gate_tail
        if WANTS_BIAS:
            bias_sum_wide += d_wide
            bias_sum_tail += d_tail
        if d_branch is not None:
            tl.store(d_branch + row + wide, d_wide, mask=in_wide)
            tl.store(d_branch + row + tail, d_tail, mask=in_tail)
    if WANTS_TABLES:
        _store_sums(partials, 0, tile, num_tiles, wide, tail, in_tail, shift_sum_wide, shift_sum_tail, C)
        _store_sums(partials, 1, tile, num_tiles, wide, tail, in_tail, scale_sum_wide, scale_sum_tail, C)
    if WANTS_GATE:
        index = 2 * WANTS_TABLES
        _store_sums(partials, index, tile, num_tiles, wide, tail, in_tail, gate_sum_wide, gate_sum_tail, C)
    if WANTS_BIAS:
        index = 2 * WANTS_TABLES + WANTS_GATE
        _store_sums(partials, index, tile, num_tiles, wide, tail, in_tail, bias_sum_wide, bias_sum_tail, C)


def launch_backward(
    op: str,
    *,
    d_residual: Tensor | None = None,
    d_normed: Tensor | None = None,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    d_x: Tensor | None = None,
    d_branch: Tensor | None = None,
    d_shift: Tensor | None = None,
    d_scale: Tensor | None = None,
    d_gate: Tensor | None = None,
    d_bias: Tensor | None = None,
    frame_rows: Tensor,
    tiles: Tensor,
    video_tiles: Tensor,
) -> None:
    """Runs the backward of `op` into those outputs that are given; d_shift and d_scale go together.

    What is not given leaves its part out, as in the kernel.
    """
    gradient = d_normed if d_residual is None else d_residual
    channels = gradient.shape[1]
    scale, gate = dense_rows(scale), dense_rows(gate)
    by_row = [output for output in (d_shift, d_scale, d_gate) if output is not None]
    sums = len(by_row) + (d_bias is not None)
    partials = gradient.new_empty(sums, tiles.shape[0], channels, dtype=torch.float32) if sums else None
    configuration = select(CONFIGURATIONS, f"{op}_backward", "any", gradient.device)
    d_residual, d_normed, residual, branch, bias = contiguous(d_residual, d_normed, residual, branch, bias)
    launch(
        residual_norm_backward,
        (tiles.shape[0],),
        gradient,
        (
            d_residual,
            d_normed,
            residual,
            mean,
            rstd,
            scale,
            branch if d_gate is not None else None,
            gate,
            bias if d_gate is not None else None,
            d_x,
            d_branch,
            partials,
            frame_rows,
            tiles,
            row_stride(scale),
            row_stride(gate),
        ),
        {
            "WANTS_TABLES": d_scale is not None,
            "WANTS_GATE": d_gate is not None,
            "WANTS_BIAS": d_bias is not None,
            **split_columns(channels, configuration["tail_bytes"] // gradient.element_size()),
            "THREADS": 32 * configuration.num_warps,
            **configuration.launch,
        },
    )
    if partials is not None:
        launch_sum_tiles(partials, by_row, d_bias, tiles=tiles, frame_rows=frame_rows, video_tiles=video_tiles)


def compile_cases(arch: str) -> list[CompileCase]:
    return [_compile_case(op, parts, dtype, arch) for op, parts, dtype in COMPILED]


def _compile_case(op: str, parts: str, dtype: str, arch: str) -> CompileCase:
    configuration = candidates_of(CONFIGURATIONS, f"{op}_backward", "any", arch)[0]
    given = parts.split()
    needs = {
        "d_residual": "branch",
        "d_normed": "norm",
        "residual": "norm",
        "mean": "norm",
        "rstd": "norm",
        "scale": "norm",
        "branch": "gate",
        "gate": "gate",
        "bias": "gate",
        "d_x": "norm",
        "d_branch": "gate",
    }
    absent = [name for name, part in needs.items() if part not in given]
    element = 4 if dtype == "fp32" else 2
    types = dict.fromkeys(needs, f"*{dtype}") | {"mean": "*fp32", "rstd": "*fp32"}
    strides = ("scale_stride", "gate_stride")
    return CompileCase(
        name=f"{op}_backward",
        kernel=residual_norm_backward,
        signature={name: kind for name, kind in types.items() if name not in absent}
        | {"partials": "*fp32", "frame_rows": "*i32", "tiles": "*i32"}
        | dict.fromkeys(strides, "i32"),
        constants=dict.fromkeys(absent)
        | split_columns(1152, configuration["tail_bytes"] // element)
        | {"THREADS": 32 * configuration.num_warps}
        | {"WANTS_TABLES": "norm" in given, "WANTS_GATE": "gate" in given, "WANTS_BIAS": "bias" in given},
        configuration=configuration,
        dtype=dtype,
        divisible_by_16=strides,
        note=parts,
        unit="element",
        work=1152,
    )
