"""Modulated norm: LayerNorm without affine, then the shift and scale of each frame's row.

    y = LN(x) · (1 + scale[row]) + shift[row],   LN(x) = (x - mean) / sqrt(variance + eps) over C

Replaces in ST-DiT-2: norm1, norm_temp, norm2 and norm_final with their `t2i_modulate` and frame-mask selection.

Kernels: rows/residual_norm_forward.py and _backward.py. Limits: float32, float16, bfloat16; C at least 2.

Letters: N tokens, C channels, F frames, R rows of the modulation table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_modulation
from .dispatch import choose_backend
from .layout import PackLayout
from .registration import empty_as, empty_if, kernel_op, output_dtype
from .rows.residual_norm_tiles import choose_tiles
from .token_rows import token_rows


def modulated_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, frame_rows: Tensor, layout: PackLayout, eps: float = 1e-6
) -> Tensor:
    shift, scale = (token_rows(table, frame_rows, layout) for table in (shift, scale))
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    layout: PackLayout,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalizes tokens and modulates them with the row of their frame.

    Args:
        x: [N, C] tokens.
        shift, scale: [R, C]; may be strided views of one table.
        frame_rows: int32 [F], from `layout.modulation_rows`; tables of B rows go with `layout.frame_video` only.
        layout: the pack's layout.
        eps: added to the variance.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        [N, C] in the dtype that x, shift and scale promote to; under autocast in autocast's, which the Linear behind it
        would cast it to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_modulation("modulated_norm", x, layout, frame_rows, shift=shift, scale=scale)
    dtype = output_dtype(x, shift, scale)
    if choose_backend("modulated_norm", backend, x, shift, scale) == "reference":
        return modulated_norm_reference(x, shift, scale, frame_rows, layout, eps).to(dtype)
    tables = choose_tiles("modulated_norm", layout)
    return _modulated_norm(x, shift, scale, frame_rows, *tables, eps, dtype)[0]


# ---- registration: tensors and numbers only; the layout's tables come one by one ----


@kernel_op("opensora_fast::modulated_norm")
def _modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    tiles: Tensor,
    backward_tiles: Tensor,
    backward_video_tiles: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (normed [N, C] of `dtype`, mean float32 [N], rstd float32 [N])."""
    from .rows.residual_norm_forward import launch_forward

    normed, mean, rstd = allocate_norm(x, dtype)
    launch_forward(
        "modulated_norm",
        x=x,
        shift=shift,
        scale=scale,
        normed=normed,
        mean=mean,
        rstd=rstd,
        frame_rows=frame_rows,
        tiles=tiles,
        eps=eps,
    )
    return normed, mean, rstd


@_modulated_norm.register_fake
def _(x, shift, scale, frame_rows, tiles, backward_tiles, backward_video_tiles, eps, dtype):
    return allocate_norm(x, dtype)


def allocate_norm(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For x [N, C], uninitialized: normed [N, C] of `dtype`, mean and rstd, float32 [N]."""
    statistics = [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)]
    return empty_as(x, dtype), *statistics


@kernel_op("opensora_fast::modulated_norm_backward")
def _modulated_norm_backward(
    d_normed: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    tiles: Tensor,
    video_tiles: Tensor,
    shift_dtype: torch.dtype,
    wants_x: bool,
    wants_tables: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (d_x [N, C], d_shift [R, C], d_scale [R, C]); those that are not wanted are empty."""
    from .rows.residual_norm_backward import launch_backward

    outputs = _allocate_gradients(x, scale, shift_dtype, wants_x, wants_tables)
    launch_backward(
        "modulated_norm",
        d_normed=d_normed,
        residual=x,
        mean=mean,
        rstd=rstd,
        scale=scale,
        d_x=outputs[0] if wants_x else None,
        d_shift=outputs[1] if wants_tables else None,
        d_scale=outputs[2] if wants_tables else None,
        frame_rows=frame_rows,
        tiles=tiles,
        video_tiles=video_tiles,
    )
    return outputs


@_modulated_norm_backward.register_fake
def _(d_normed, x, mean, rstd, scale, frame_rows, tiles, video_tiles, shift_dtype, wants_x, wants_tables):
    return _allocate_gradients(x, scale, shift_dtype, wants_x, wants_tables)


def _allocate_gradients(
    x: Tensor, scale: Tensor, shift_dtype: torch.dtype, wants_x: bool, wants_tables: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_if(wants_x, x), empty_if(wants_tables, scale, shift_dtype), empty_if(wants_tables, scale)


def _setup_context(ctx, inputs, output) -> None:
    x, shift, scale, frame_rows, _, backward_tiles, backward_video_tiles, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, scale, frame_rows, backward_tiles, backward_video_tiles)
    ctx.shift_dtype = shift.dtype


def _backward(ctx, d_normed, d_mean, d_rstd):
    wants_x, wants_shift, wants_scale, *_ = ctx.needs_input_grad
    gradients = [None] * 9
    if d_normed is not None and (wants_x or wants_shift or wants_scale):
        d_x, d_shift, d_scale = _modulated_norm_backward(
            d_normed, *ctx.saved_tensors, ctx.shift_dtype, wants_x, wants_shift or wants_scale
        )
        gradients[0] = d_x if wants_x else None
        gradients[1] = d_shift if wants_shift else None
        gradients[2] = d_scale if wants_scale else None
    return tuple(gradients)


_modulated_norm.register_autograd(_backward, setup_context=_setup_context)
