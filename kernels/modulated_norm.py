"""Modulated norm: LayerNorm without affine, then the shift and scale of each frame's row.

    y = LN(x) · (1 + scale[row]) + shift[row],   LN(x) = (x - mean) / sqrt(variance + eps) over C

Replaces in ST-DiT-2: norm1, norm_temp, norm2 and norm_final with their `t2i_modulate` and frame-mask selection.

Letters: N tokens, C channels, F frames, R rows of the modulation table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_modulation
from .dispatch import choose
from .layout import PackLayout


def modulated_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, frame_rows: Tensor, layout: PackLayout, eps: float = 1e-6
) -> Tensor:
    token_rows = frame_rows[layout.token_frame]
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale[token_rows]) + shift[token_rows]


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
        frame_rows: int32 [F], from `layout.modulation_rows`.
        layout: the pack's layout.
        eps: added to the variance.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, C] in the dtype that x, shift and scale promote to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_modulation("modulated_norm", x, layout, frame_rows, shift=shift, scale=scale)
    choose("modulated_norm", backend, x, has_triton=False)
    return modulated_norm_reference(x, shift, scale, frame_rows, layout, eps)
