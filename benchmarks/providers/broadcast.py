"""Modulation by broadcast: a block of ST-DiT-2 in plain PyTorch, as one writes it who compiles it.

The reference gathers a row of the modulation tables for every token. Backward adds up the tokens of a video in the
dtype of the table, and each addition rounds: the gradients of tables in bfloat16 are 9 % off for the 6480 tokens of a
video of 240p, in eager PyTorch (on an H200 and on a CPU) and compiled for a CPU; compiled for Hopper (torch 2.11 and
2.13) these are atomic additions of bfloat16 to the same few rows. Rows that are broadcast over the tokens of a frame
have sums in float32 for their gradient: 0.3 % off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.qk_norm_rotary import statistics_dtype
from opensora_fast.model.block import PackContext, modulation_tables, norm_weight

from .variants import attention_by

EPS = 1e-6


def token_rows(table: Tensor, frame_rows: Tensor, layout: PackLayout) -> Tensor:
    """The row [C] of `table` [R, C] that each token has: [N, C], a view where all videos are of one shape."""
    # A frame's row is gathered in float32, so that the sum over the frames is one in float32, too.
    frames = table.to(statistics_dtype(table.dtype))[frame_rows].to(table.dtype)
    parts = []
    for run in layout.runs:
        rows = frames[run.first_frame : run.first_frame + run.videos * run.frames]
        parts.append(rows[:, None].expand(-1, run.frame_tokens, -1).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """All [N, C]."""
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def compute_broadcast_block(
    block: nn.Module, x: Tensor, context: PackContext, sdpa_order: tuple[str, ...] = ()
) -> Tensor:
    """x [N, C] → [N, C]: what `opensora_fast.model.block.compute_block` computes.

    `sdpa_order`: see `attention_by`.
    """
    with attention_by(sdpa_order):
        return _compute(block, x, context)


def _compute(block: nn.Module, x: Tensor, context: PackContext) -> Tensor:
    layout = context.layout
    tables = modulation_tables([block], context)[0]
    space_and_time = [token_rows(table, context.frame_rows, layout) for table in tables]
    shift_space, scale_space, gate_space, shift_mlp, scale_mlp, gate_mlp, *of_time = space_and_time
    shift_time, scale_time, gate_time = of_time

    attention = block.attn
    qkv = attention.qkv(modulate(x, shift_space, scale_space)).unflatten(1, (3, attention.num_heads, -1))
    weights = norm_weight(attention.q_norm), norm_weight(attention.k_norm)
    attended = kernels.spatial_attention(qkv, *weights, layout, backend="reference")
    x = x + gate_space * attention.proj(attended.flatten(1))

    attention = block.attn_temp
    qkv = attention.qkv(modulate(x, shift_time, scale_time)).unflatten(1, (3, attention.num_heads, -1))
    weights = norm_weight(attention.q_norm), norm_weight(attention.k_norm)
    attended = kernels.temporal_attention(qkv, *weights, context.cos, context.sin, layout, backend="reference")
    x = x + gate_time * attention.proj(attended.flatten(1))

    attention = block.cross_attn
    q = attention.q_linear(x).unflatten(1, (attention.num_heads, -1))
    kv = attention.kv_linear(context.text).unflatten(1, (2, attention.num_heads, -1))
    attended = kernels.cross_attention(q, kv, layout, context.text_layout, backend="reference")
    x = x + attention.proj(attended.flatten(1))

    hidden = kernels.gelu_tanh(block.mlp.fc1(modulate(x, shift_mlp, scale_mlp)), backend="reference")
    return x + gate_mlp * block.mlp.fc2(hidden)
