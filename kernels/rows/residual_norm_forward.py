"""The Triton forward of `modulated_norm`, `gate_residual` and `gate_residual_modulated_norm`.

    residual = x + gate[row] · (branch + bias)               (without a branch, in modulated_norm: residual = x)
    normed   = x̂ · (1 + scale[row]) + shift[row],            (left out in gate_residual)
               x̂ = (residual - mean) · rstd over C

One kernel, since the parts are the same: an argument that is None leaves its part out when the kernel is compiled. One
program walks a tile of tokens of one frame, a row at a time, so it reads one row of the modulation tables, once. The
statistics are float32 and two-pass, over the values as they are stored. Bytes a token in rows of C values:
modulated_norm 2, gate_residual 3, gate_residual_modulated_norm 4; mean and rstd, 8 bytes, are kept for the backward.

Letters: N tokens, C channels, F frames, R rows of the modulation tables.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, candidates_of, select
from ..launch import launch
from ..registration import contiguous
from .residual_norm_tiles import (
    COMPILED,
    CONFIGURATIONS,
    split_columns,
)


@triton.jit
def load_row(pointer, row, columns, within):
    """Some columns of one row in float32, or zeros where there is no tensor; `row` counts elements."""
    if pointer is None:
        return tl.zeros_like(columns).to(tl.float32)
    else:
        return tl.load(pointer + row + columns, mask=within, other=0.0).to(tl.float32)


@triton.jit
def fold_row(wide, tail, WIDE: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, BYTES: tl.constexpr):
    """Sums whose sum is that over the C columns of a row: what each thread has of WIDE, sixteen bytes at a time, and of
    TAIL, so that nothing passes through shared memory."""
    SUMS: tl.constexpr = min(THREADS, TAIL)
    LOADED: tl.constexpr = min(16 // BYTES, WIDE // SUMS)
    wide = tl.sum(tl.sum(tl.reshape(wide, [WIDE // SUMS // LOADED, SUMS, LOADED]), axis=2), axis=0)
    return wide + tl.sum(tl.reshape(tail, [SUMS, TAIL // SUMS]), axis=1)


@triton.jit
def _add_branch(x, branch, gate, gate_row, bias_row, row, columns, within):
    """x + gate · (branch + bias) in float32 [columns]; without a gate times one, without a branch x alone."""
    value = load_row(x, row, columns, within)
    if branch is not None:
        added = load_row(branch, row, columns, within) + bias_row
        if gate is not None:
            added *= gate_row
        value += added
    return value


@triton.jit
def residual_norm_forward(
    x,  # [N, C]
    branch,  # [N, C] or None
    gate,  # [R, C] or None
    bias,  # [C] or None
    shift,  # [R, C] or None
    scale,  # [R, C] or None
    residual,  # [N, C] out, or None
    normed,  # [N, C] out, or None
    mean,  # float32 [N] out, or None
    rstd,  # float32 [N] out, or None
    frame_rows,  # int32 [F]
    tiles,  # int32 [tiles, 3]
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.load(tiles + 3 * tile).to(tl.int64)
    count = tl.load(tiles + 3 * tile + 1)
    entry = tl.load(frame_rows + tl.load(tiles + 3 * tile + 2)).to(tl.int64)
    BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    wide, tail = tl.arange(0, WIDE), WIDE + tl.arange(0, TAIL)
    in_wide, in_tail = wide < C, tail < C
    gate_wide = load_row(gate, entry * gate_stride, wide, in_wide)
    gate_tail = load_row(gate, entry * gate_stride, tail, in_tail)
    bias_wide, bias_tail = load_row(bias, 0, wide, in_wide), load_row(bias, 0, tail, in_tail)
    shift_wide = load_row(shift, entry * shift_stride, wide, in_wide)
    shift_tail = load_row(shift, entry * shift_stride, tail, in_tail)
    scale_wide = load_row(scale, entry * scale_stride, wide, in_wide)
    scale_tail = load_row(scale, entry * scale_stride, tail, in_tail)
    for step in tl.range(0, count, num_stages=STAGES):
        token = first + step
        row = token * C
        value_wide = _add_branch(x, branch, gate, gate_wide, bias_wide, row, wide, in_wide)
        value_tail = _add_branch(x, branch, gate, gate_tail, bias_tail, row, tail, in_tail)
        if residual is not None:
            # The norm sees what is stored, so that the backward, which loads it, sees the same.
            stored_wide = value_wide.to(residual.dtype.element_ty)
            stored_tail = value_tail.to(residual.dtype.element_ty)
            tl.store(residual + row + wide, stored_wide, mask=in_wide)
            tl.store(residual + row + tail, stored_tail, mask=in_tail)
            value_wide, value_tail = stored_wide.to(tl.float32), stored_tail.to(tl.float32)
        if normed is not None:
            average = tl.sum(fold_row(value_wide, value_tail, WIDE, TAIL, THREADS, BYTES)) / C
            value_wide -= average
            value_tail = tl.where(in_tail, value_tail - average, 0.0)
            squares = fold_row(value_wide * value_wide, value_tail * value_tail, WIDE, TAIL, THREADS, BYTES)
            variance = tl.sum(squares) / C
            scaling = 1.0 / tl.sqrt(variance + eps)
            tl.store(mean + token, average)
            tl.store(rstd + token, scaling)
            out_wide = value_wide * scaling * (1.0 + scale_wide) + shift_wide
            out_tail = value_tail * scaling * (1.0 + scale_tail) + shift_tail
            tl.store(normed + row + wide, out_wide, mask=in_wide)
            tl.store(normed + row + tail, out_tail, mask=in_tail)


def launch_forward(
    op: str,
    *,
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    normed: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    frame_rows: Tensor,
    tiles: Tensor,
    eps: float,
) -> None:
    """Runs the forward of `op` into its outputs; tokens are made contiguous, tables may be strided by rows.

    What is not given leaves its part out, as in the kernel.
    """
    x, branch, bias = contiguous(x, branch, bias)
    gate, shift, scale = (dense_rows(table) for table in (gate, shift, scale))
    configuration = select(CONFIGURATIONS, f"{op}_forward", "any", x.device)
    launch(
        residual_norm_forward,
        (tiles.shape[0],),
        x,
        (
            x,
            branch,
            gate,
            bias,
            shift,
            scale,
            residual,
            normed,
            mean,
            rstd,
            frame_rows,
            tiles,
            row_stride(gate),
            row_stride(shift),
            row_stride(scale),
            eps,
        ),
        {
            **split_columns(x.shape[1]),
            "THREADS": 32 * configuration.num_warps,
            **configuration.launch,
        },
    )


def dense_rows(table: Tensor | None) -> Tensor | None:
    """A table whose rows are contiguous; the rows themselves may lie apart, as views of one larger table do."""
    return table.contiguous() if table is not None and table.stride(1) != 1 else table


def row_stride(table: Tensor | None) -> int:
    return 0 if table is None else table.stride(0)


def compile_cases(arch: str) -> list[CompileCase]:
    return [_compile_case(op, parts, dtype, arch) for op, parts, dtype in COMPILED]


def _compile_case(op: str, parts: str, dtype: str, arch: str) -> CompileCase:
    configuration = candidates_of(CONFIGURATIONS, f"{op}_forward", "any", arch)[0]
    given = parts.split()
    tokens = {"x": "x", "branch": "branch", "gate": "gate", "bias": "bias", "shift": "norm", "scale": "norm"}
    outputs = {"residual": "branch", "normed": "norm", "mean": "norm", "rstd": "norm"}
    types = {name: f"*{dtype}" for name in (*tokens, *outputs)} | {"mean": "*fp32", "rstd": "*fp32"}
    absent = [name for name, part in (tokens | outputs).items() if part != "x" and part not in given]
    strides = ("gate_stride", "shift_stride", "scale_stride")
    return CompileCase(
        name=f"{op}_forward",
        kernel=residual_norm_forward,
        signature={name: kind for name, kind in types.items() if name not in absent}
        | {"frame_rows": "*i32", "tiles": "*i32", "eps": "fp32"}
        | dict.fromkeys(strides, "i32"),
        constants=dict.fromkeys(absent) | split_columns(1152) | {"THREADS": 32 * configuration.num_warps},
        configuration=configuration,
        dtype=dtype,
        divisible_by_16=strides,
        note=parts,
        unit="element",
        work=1152,
    )
