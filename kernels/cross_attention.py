"""Cross-attention: the tokens of each video attend to the text of that video; text lengths are ragged.

    y = softmax(q · kᵀ / sqrt(D)) · v   over the text tokens of the video; zero where a video has no text

Replaces in ST-DiT-2: everything between `cross_attn.q_linear` / `kv_linear` and `cross_attn.proj`.

Letters: N video tokens, M text tokens, H heads, D head size, L the longest text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor, check_tokens
from .dispatch import choose
from .layout import PackLayout, TextLayout


def cross_attention_reference(q: Tensor, kv: Tensor, layout: PackLayout, text: TextLayout) -> Tensor:
    # The text is padded to its known bound on the device: lengths that only the GPU knows are never read by the host.
    position = torch.arange(text.max_length, device=q.device)
    real = position < text.lengths[:, None]  # [B, L]
    index = torch.where(real, text.starts[:, None] + position, 0)
    padded = kv[index] if text.num_tokens else kv.new_zeros(*index.shape, *kv.shape[1:])  # [B, L, 2, H, D]
    k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, L, D]
    attend = (real | (text.lengths == 0)[:, None])[:, None, None]  # a video without text: any finite softmax, then zero
    has_text = (text.lengths > 0)[:, None, None, None]
    outputs = []
    for run in layout.runs:
        videos = slice(run.first_video, run.first_video + run.videos)
        rows = q[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos, -1, *rows.shape[1:]).transpose(1, 2)  # [videos, H, T·S, D]
        output = torch.nn.functional.scaled_dot_product_attention(
            rows, k[videos].to(rows.dtype), v[videos].to(rows.dtype), attn_mask=attend[videos]
        )
        output = torch.where(has_text[videos], output, 0)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def cross_attention(q: Tensor, kv: Tensor, layout: PackLayout, text: TextLayout, *, backend: str = "auto") -> Tensor:
    """Attends from video tokens to their video's text.

    Args:
        q: [N, H, D], output of the query Linear.
        kv: [M, 2, H, D], output of the key-value Linear.
        layout: the pack's layout.
        text: where each video's text tokens lie in kv.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, H, D]; zero for the tokens of a video without text.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "cross_attention"
    check_tokens(op, "q", q, layout, None, None)
    check_tensor(op, "kv", kv, (text.num_tokens, 2, q.shape[1], q.shape[2]), layout.device)
    if text.lengths.shape != (layout.num_videos,):
        raise ValueError(f"{op}: text describes {text.lengths.shape[0]} videos, the layout {layout.num_videos}")
    choose(op, backend, q, has_triton=False)
    return cross_attention_reference(q, kv, layout, text)
