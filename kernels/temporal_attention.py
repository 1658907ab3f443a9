"""Temporal attention: among the T frames at each place, with rotary embedding, then RMS QK-norm.

    y = softmax(norm(rotate(q)) · norm(rotate(k))ᵀ / sqrt(D)) · v   at each place and head; position = frame index

Replaces in ST-DiT-2: everything between `attn_temp.qkv` and `attn_temp.proj`, the transposes to and from
[places, frames] included: qkv is read in place.

Letters: N tokens, H heads, D head size, T frames of a video, S tokens of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import choose
from .layout import PackLayout
from .qk_norm_rotary import rms_norm_reference, rotary_reference
from .spatial_attention import check_self_attention


def temporal_attention_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: PackLayout,
    eps: float = 1e-6,
) -> Tensor:
    outputs = []
    for run in layout.runs:
        rows = qkv[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos, run.frames, run.frame_tokens, *rows.shape[1:])
        q, k, v = rows.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [videos, S, H, T, D]
        q, k = (rotary_reference(z, cos[: run.frames], sin[: run.frames]) for z in (q, k))
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
        q, k, v = (z.flatten(0, 1).to(q.dtype) for z in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # [videos·S, H, T, D]
        output = output.unflatten(0, (run.videos, run.frame_tokens)).permute(0, 3, 1, 2, 4)
        outputs.append(output.flatten(0, 2))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: PackLayout,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Attends over time at each place of each video of a pack.

    Args:
        qkv: [N, 3, H, D], output of the qkv Linear.
        q_weight, k_weight: [D] weights of the QK-norm; both None for no norm.
        cos, sin: float32 [at least the longest T, D/2], cosine and sine of frame index · frequency. No gradient.
        layout: the pack's layout.
        eps: of the RMS norm.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, H, D].

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "temporal_attention"
    check_self_attention(op, qkv, q_weight, k_weight, layout)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, (None, qkv.shape[3] // 2), layout.device)
        if table.shape[0] < layout.max_frames:
            raise ValueError(f"{op}: {name} has {table.shape[0]} rows, but a video has {layout.max_frames} frames")
    choose(op, backend, qkv, has_triton=False)
    return temporal_attention_reference(qkv, q_weight, k_weight, cos, sin, layout, eps)
