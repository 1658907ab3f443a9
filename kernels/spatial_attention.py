"""Spatial attention: among the S tokens of each frame, with RMS QK-norm.

    y = softmax(norm(q) · norm(k)ᵀ / sqrt(D)) · v   within each frame and head

Replaces in ST-DiT-2: everything between `attn.qkv` and `attn.proj`.

Letters: N tokens, H heads, D head size, S tokens of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor, check_tokens
from .dispatch import choose
from .layout import PackLayout
from .qk_norm_rotary import rms_norm_reference


def spatial_attention_reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, layout: PackLayout, eps: float = 1e-6
) -> Tensor:
    outputs = []
    for run in layout.runs:
        rows = qkv[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos * run.frames, run.frame_tokens, *rows.shape[1:])
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # each [frames, H, S, D]
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
        output = torch.nn.functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def spatial_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackLayout,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Attends within each frame of a pack.

    Args:
        qkv: [N, 3, H, D], output of the qkv Linear.
        q_weight, k_weight: [D] weights of the QK-norm; both None for no norm.
        layout: the pack's layout.
        eps: of the RMS norm.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, H, D].

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_self_attention("spatial_attention", qkv, q_weight, k_weight, layout)
    choose("spatial_attention", backend, qkv, has_triton=False)
    return spatial_attention_reference(qkv, q_weight, k_weight, layout, eps)


def check_self_attention(op: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, layout: PackLayout):
    check_tokens(op, "qkv", qkv, layout, 3, None, None)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: give both q_weight and k_weight, or neither")
    if q_weight is not None and k_weight is not None:
        check_tensor(op, "q_weight", q_weight, (qkv.shape[3],), layout.device)
        check_tensor(op, "k_weight", k_weight, (qkv.shape[3],), layout.device)
