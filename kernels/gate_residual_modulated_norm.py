"""Gate, residual and the next modulated norm in one pass.

    residual = x + gate[row] · (branch + bias)
    normed   = LN(residual) · (1 + scale[row]) + shift[row]

As `gate_residual` followed by `modulated_norm`; see there for the parts.

Replaces in ST-DiT-2: gate, frame-mask selection and residual after a branch, and the modulated norm before the next.

Kernels: rows/residual_norm_forward.py and _backward.py. Limits: float32, float16, bfloat16; C at least 2.

Letters: N tokens, C channels, F frames, R rows of the modulation table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose_backend
from .gate_residual import check_branch, gate_residual_reference
from .layout import PackLayout
from .modulated_norm import allocate_norm, modulated_norm_reference
from .registration import empty_as, empty_if, kernel_op, output_dtype, promote
from .rows.residual_norm_tiles import choose_tiles


def gate_residual_modulated_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    layout: PackLayout,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    residual = gate_residual_reference(x, branch, gate, frame_rows, layout, bias)
    return residual, modulated_norm_reference(residual, shift, scale, frame_rows, layout, eps)


def gate_residual_modulated_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    layout: PackLayout,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds a gated branch to the residual stream and makes the input of the next branch.

    Args:
        x, branch, gate, frame_rows, layout, bias: as in `gate_residual`.
        shift, scale: [R, C] of the next modulated norm.
        eps: added to the variance.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        (residual [N, C], normed [N, C]): in the dtypes that `gate_residual` and `modulated_norm` give.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "gate_residual_modulated_norm"
    check_branch(op, x, branch, frame_rows, layout, bias, gate=gate, shift=shift, scale=scale)
    residual_dtype = promote(x, branch, gate, bias)
    dtype = output_dtype(x, branch, gate, bias, shift, scale)
    if choose_backend(op, backend, x, branch, gate, bias, shift, scale) == "reference":
        residual, normed = gate_residual_modulated_norm_reference(
            x, branch, gate, shift, scale, frame_rows, layout, bias, eps
        )
        return residual, normed.to(dtype)
    tables = choose_tiles(op, layout)
    residual, normed, _, _ = _gate_residual_modulated_norm(
        x, branch, gate, bias, shift, scale, frame_rows, *tables, eps, residual_dtype, dtype
    )
    return residual, normed


# ---- registration: tensors and numbers only; the layout's tables come one by one ----


@kernel_op("opensora_fast::gate_residual_modulated_norm")
def _gate_residual_modulated_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    tiles: Tensor,
    backward_tiles: Tensor,
    backward_video_tiles: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (residual [N, C], normed [N, C], mean float32 [N], rstd float32 [N])."""
    from .rows.residual_norm_forward import launch_forward

    residual, normed, mean, rstd = _allocate(x, residual_dtype, dtype)
    launch_forward(
        "gate_residual_modulated_norm",
        x=x,
        branch=branch,
        gate=gate,
        bias=bias,
        shift=shift,
        scale=scale,
        residual=residual,
        normed=normed,
        mean=mean,
        rstd=rstd,
        frame_rows=frame_rows,
        tiles=tiles,
        eps=eps,
    )
    return residual, normed, mean, rstd


@_gate_residual_modulated_norm.register_fake
def _(
    x,
    branch,
    gate,
    bias,
    shift,
    scale,
    frame_rows,
    tiles,
    backward_tiles,
    backward_video_tiles,
    eps,
    residual_dtype,
    dtype,
):
    return _allocate(x, residual_dtype, dtype)


def _allocate(x: Tensor, residual_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_as(x, residual_dtype), *allocate_norm(x, dtype)


@kernel_op("opensora_fast::gate_residual_modulated_norm_backward")
def _gate_residual_modulated_norm_backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    frame_rows: Tensor,
    tiles: Tensor,
    video_tiles: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns d_x, d_branch [N, C], d_shift, d_scale, d_gate [R, C], d_bias [C]; those that are not wanted are empty.

    `wants` says so for (d_x, d_branch, d_shift and d_scale, d_gate, d_bias).
    """
    from .rows.residual_norm_backward import launch_backward

    outputs = _allocate_gradients(residual, scale, gate, bias, x_dtype, branch_dtype, shift_dtype, wants)
    wanted = [output if output.numel() else None for output in outputs]
    launch_backward(
        "gate_residual_modulated_norm",
        d_residual=d_residual,
        d_normed=d_normed,
        residual=residual if d_normed is not None else None,
        mean=mean,
        rstd=rstd,
        scale=scale if d_normed is not None else None,
        branch=branch,
        gate=gate,
        bias=bias,
        d_x=wanted[0],
        d_branch=wanted[1],
        d_shift=wanted[2],
        d_scale=wanted[3],
        d_gate=wanted[4],
        d_bias=wanted[5],
        frame_rows=frame_rows,
        tiles=tiles,
        video_tiles=video_tiles,
    )
    return outputs


@_gate_residual_modulated_norm_backward.register_fake
def _(
    d_residual,
    d_normed,
    residual,
    mean,
    rstd,
    scale,
    branch,
    gate,
    bias,
    frame_rows,
    tiles,
    video_tiles,
    x_dtype,
    branch_dtype,
    shift_dtype,
    wants,
):
    return _allocate_gradients(residual, scale, gate, bias, x_dtype, branch_dtype, shift_dtype, wants)


def _allocate_gradients(
    residual: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wants_x, wants_branch, wants_tables, wants_gate, wants_bias = wants
    return (
        empty_if(wants_x, residual, x_dtype),
        empty_if(wants_branch, residual, branch_dtype),
        empty_if(wants_tables, scale, shift_dtype),
        empty_if(wants_tables, scale),
        empty_if(wants_gate, scale if gate is None else gate),
        empty_if(wants_bias, scale if bias is None else bias),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, branch, gate, bias, shift, scale, frame_rows, _, backward_tiles, backward_video_tiles, *_ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    wants_gate = ctx.needs_input_grad[2]
    ctx.save_for_backward(
        residual,
        mean,
        rstd,
        scale,
        branch if wants_gate else None,
        gate,
        bias,
        frame_rows,
        backward_tiles,
        backward_video_tiles,
    )
    ctx.dtypes = x.dtype, branch.dtype, shift.dtype


def _backward(ctx, d_residual, d_normed, d_mean, d_rstd):
    x_dtype, branch_dtype, _ = ctx.dtypes
    wants_x, wants_branch, wants_gate, wants_bias, wants_shift, wants_scale, *_ = ctx.needs_input_grad
    gradients = [None] * 13
    if d_residual is None and d_normed is None:
        return tuple(gradients)
    saved = ctx.saved_tensors
    gate = saved[5]
    # Without a gate d_branch is d_x itself: one of them is written.
    shared = wants_x and wants_branch and gate is None and x_dtype == branch_dtype
    wants_tables = (wants_shift or wants_scale) and d_normed is not None
    wants = [wants_x, wants_branch and not shared, wants_tables, wants_gate, wants_bias]
    d_x, d_branch, d_shift, d_scale, d_gate, d_bias = _gate_residual_modulated_norm_backward(
        d_residual, d_normed, *saved, *ctx.dtypes, wants
    )
    gradients[0] = d_x if wants_x else None
    gradients[1] = d_x if shared else d_branch if wants_branch else None
    gradients[2] = d_gate if wants_gate else None
    gradients[3] = d_bias if wants_bias else None
    gradients[4] = d_shift if wants_shift and wants_tables else None
    gradients[5] = d_scale if wants_scale and wants_tables else None
    return tuple(gradients)


_gate_residual_modulated_norm.register_autograd(_backward, setup_context=_setup_context)
