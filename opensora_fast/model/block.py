"""One block of ST-DiT-2 on a pack: spatial attention, temporal attention, cross-attention, MLP.

The modules hold parameters under upstream's names; what they compute is written out in `compute_block`, one line per op
of `opensora_fast.kernels`. It reads nothing but parameters, so it serves upstream's own blocks too (see `replace.py`);
what others have put on a module inside a block, and expect to be called, it refuses.
Biases that an op adds itself are left out of the matrix product before it; a detached bias gets its gradient from the
op behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout, TextLayout, linear
from opensora_fast.parallel.sequence import FrameShare

from .backends import Backends
from .parameters_only import PlainLinears, find_bypassed


class NormWeight(nn.Module):
    """The weight [D] of an RMS norm; the norm itself is part of the attention ops."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class SelfAttention(PlainLinears):
    def __init__(self, channels: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.q_norm = NormWeight(channels // num_heads) if qk_norm else None
        self.k_norm = NormWeight(channels // num_heads) if qk_norm else None


class CrossAttention(PlainLinears):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)


class MLP(PlainLinears):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)


@dataclass(frozen=True, eq=False)
class PackContext:
    """What every block of one forward pass shares.

    Attributes:
        layout: the pack's layout.
        frame_rows: int32 [F], each frame's row in the modulation tables.
        text: [M, C] embedded captions.
        text_layout: where each video's text lies.
        space_and_mlp: [R, 6, C] output of `t_block`.
        time: [R, 3, C] output of `t_block_temp`.
        cos, sin: float32 [T, D/2] tables of the rotary embedding.
        backends: the implementation of each op.
        share: where several processes compute the pack together, what of it is in this layout, which is of shorter
            videos then.
    """

    layout: PackLayout
    frame_rows: Tensor
    text: Tensor
    text_layout: TextLayout
    space_and_mlp: Tensor
    time: Tensor
    cos: Tensor
    sin: Tensor
    backends: Backends
    share: FrameShare | None = None


class STDiT2Block(nn.Module):
    """Parameters of one block; `forward` computes it on a pack."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.attn = SelfAttention(channels, num_heads, qk_norm)
        self.attn_temp = SelfAttention(channels, num_heads, qk_norm)
        self.cross_attn = CrossAttention(channels, num_heads)
        self.mlp = MLP(channels, int(channels * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, channels) / channels**0.5)

    def forward(
        self,
        x: Tensor,
        normed: Tensor | None,
        context: PackContext,
        following: tuple[Tensor, ...] | None,
        modulation: tuple[Tensor, ...] | None = None,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """See `compute_block`. `shared`: text, space_and_mlp and time in the place of the context's, for what is
        wrapped around the block and has to see every tensor that takes a gradient."""
        if shared:
            text, space_and_mlp, time = shared
            context = replace(context, text=text, space_and_mlp=space_and_mlp, time=time)
        return compute_block(self, x, normed, context, following, modulation)


def is_wrapped(block: nn.Module) -> bool:
    """Whether something is around a block of ours, so that its parameters can be read only while it is called: FSDP
    gathers them then, and takes them away again."""
    return type(block) is not STDiT2Block or bool(block._forward_pre_hooks) or "forward" in vars(block)


def modulation_tables(blocks: Sequence[nn.Module], context: PackContext) -> list[tuple[Tensor, ...]]:
    """The tables [R, C] of each block: shift, scale, gate of space, of the MLP, and of time.

    Those of all blocks are made by two additions, since each block alone would launch dozens of small kernels for them.
    """

    def add(tables: list[Tensor], rows: Tensor) -> list[tuple[Tensor, ...]]:
        # [blocks, 6 or 3, R, C], whose tables lie one behind another as the rows do.
        added = torch.stack(tables)[:, :, None] + rows.transpose(0, 1).contiguous()
        each, width = added.flatten(0, 1).unbind(0), added.shape[1]
        return [each[first : first + width] for first in range(0, len(each), width)]

    space = add([block.scale_shift_table for block in blocks], context.space_and_mlp)
    time = add([block.scale_shift_table_temporal for block in blocks], context.time)
    return [of_space + of_time for of_space, of_time in zip(space, time, strict=True)]


def compute_block(
    block: nn.Module,
    x: Tensor,
    normed: Tensor | None,
    context: PackContext,
    following: tuple[Tensor, ...] | None,
    modulation: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes one block.

    Args:
        block: holds the parameters, under the names of `STDiT2Block`.
        x: [N, C] residual stream.
        normed: [N, C] input of spatial attention, when the block before has already made it.
        context: shared by all blocks.
        following: the next block's tables when this one is to make its `normed` in the same pass, else None.
        modulation: this block's tables; None for a block by itself, which makes them.

    Returns:
        (x [N, C], the following block's normed [N, C] or None).

    Raises:
        ValueError: a module inside the block is to be called, and would not be; see `find_bypassed`. Or a transform of
            torch.func.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            f"{type(block).__name__}: transforms of torch.func (grad, vjp, vmap, …) do not pass the kernels; take "
            "backward() or torch.autograd.grad, and torch.func.functional_call by itself"
        )
    bypassed = find_bypassed(block)
    if bypassed is not None:
        raise ValueError(
            f"{type(block).__name__}: {bypassed}, but the kernels read the parameters inside a block and call none of "
            "its modules: hook, wrap or shard (fully_shard) whole blocks, add what an adapter learns to the weight, as "
            "torch.nn.utils.parametrize does, or use Open-Sora's own model without use_kernels"
        )
    layout, rows, use = context.layout, context.frame_rows, context.backends
    if modulation is None:
        modulation = modulation_tables([block], context)[0]
    shift_space, scale_space, gate_space, shift_mlp, scale_mlp, gate_mlp, *of_time = modulation
    shift_time, scale_time, gate_time = of_time

    if normed is None:
        normed = kernels.modulated_norm(x, shift_space, scale_space, rows, layout, backend=use.modulated_norm)
    attention = block.attn
    qkv, qkv_bias = project_qkv(attention, normed, use.linear)
    attended = kernels.spatial_attention(
        qkv,
        norm_weight(attention.q_norm),
        norm_weight(attention.k_norm),
        layout,
        qkv_bias=qkv_bias,
        backend=use.spatial_attention,
    )
    x, normed = kernels.gate_residual_modulated_norm(
        x,
        linear(attended.flatten(1), attention.proj.weight, backend=use.linear),
        gate_space,
        shift_time,
        scale_time,
        rows,
        layout,
        bias=attention.proj.bias,
        backend=use.gate_residual_modulated_norm,
    )
    attention = block.attn_temp
    qkv, qkv_bias = project_qkv(attention, normed, use.linear)
    attended = attend_over_time(attention, qkv, qkv_bias, context)
    x = kernels.gate_residual(
        x,
        linear(attended.flatten(1), attention.proj.weight, backend=use.linear),
        gate_time,
        rows,
        layout,
        bias=attention.proj.bias,
        backend=use.gate_residual,
    )
    attention = block.cross_attn
    q_bias = attention.q_linear.bias
    x, queries = kernels.project_residual(x, attention.q_linear.weight, q_bias.detach(), backend=use.linear)
    attended = kernels.cross_attention(
        queries.unflatten(1, (attention.num_heads, -1)),
        attention.kv_linear(context.text).unflatten(1, (2, attention.num_heads, -1)),
        layout,
        context.text_layout,
        q_bias=q_bias.unflatten(0, (attention.num_heads, -1)),
        backend=use.cross_attention,
    )
    x, normed = kernels.gate_residual_modulated_norm(
        x,
        linear(attended.flatten(1), attention.proj.weight, backend=use.linear),
        None,
        shift_mlp,
        scale_mlp,
        rows,
        layout,
        bias=attention.proj.bias,
        backend=use.gate_residual_modulated_norm,
    )
    first, second = block.mlp.fc1, block.mlp.fc2
    branch = kernels.mlp(normed, first.weight, first.bias, second.weight, gelu=use.gelu_tanh, linear=use.linear)
    if following is None:
        bias = second.bias
        return kernels.gate_residual(x, branch, gate_mlp, rows, layout, bias=bias, backend=use.gate_residual), None
    shift_next, scale_next, *_ = following
    return kernels.gate_residual_modulated_norm(
        x,
        branch,
        gate_mlp,
        shift_next,
        scale_next,
        rows,
        layout,
        bias=second.bias,
        backend=use.gate_residual_modulated_norm,
    )


def project_qkv(attention: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """x [N, C] → qkv [N, 3, H, D], and the bias [3, H, D] in it, whose gradient attention finds on its way."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    shape = (3, attention.num_heads, -1)
    return linear(x, weight, bias.detach(), backend=backend).unflatten(1, shape), bias.unflatten(0, shape)


def attend_over_time(attention: nn.Module, qkv: Tensor, qkv_bias: Tensor, context: PackContext) -> Tensor:
    """qkv [N, 3, H, D], and the bias in it → [N, H, D]. Processes that share a pack exchange tokens for heads."""
    share = context.share
    if share is not None:
        qkv, qkv_bias = share.give_tokens(qkv), share.take_heads(qkv_bias)
    attended = kernels.temporal_attention(
        qkv,
        norm_weight(attention.q_norm),
        norm_weight(attention.k_norm),
        context.cos,
        context.sin,
        context.layout if share is None else share.whole,
        qkv_bias=qkv_bias,
        backend=context.backends.temporal_attention,
    )
    return attended if share is None else share.take_tokens(attended)


def norm_weight(norm: nn.Module | None) -> Tensor | None:
    """The weight of a QK-norm; None where the model has none (None here, an Identity in upstream's modules)."""
    return getattr(norm, "weight", None)


class FinalLayer(nn.Module):
    """Norm, modulation and the Linear to patches of noise and variance coefficients."""

    def __init__(self, channels: int, patch_outputs: int):
        super().__init__()
        self.linear = nn.Linear(channels, patch_outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(self, x: Tensor, noised: Tensor, given: Tensor | None, context: PackContext) -> Tensor:
        """x [N, C] → [N, patch²·out channels].

        Two asymmetries of upstream, which the released weights were trained with: noised frames are modulated by the
        timestep embedding alone, given frames by the embedding of timestep 0 plus the size information; and given
        frames pass the noised frames' norm and modulation first, then their own.

        Args:
            x: residual stream.
            noised: [B, C] vector of the noised frames.
            given: [B, C] vector of the given frames, or None when there are none.
            context: shared with the blocks.
        """
        layout, use = context.layout, context.backends
        modulation = self.scale_shift_table + noised[:, None]
        x = kernels.modulated_norm(
            x, modulation[:, 0], modulation[:, 1], layout.frame_video, layout, backend=use.modulated_norm
        )
        if given is not None:
            modulation = self.scale_shift_table + given[:, None]
            again = kernels.modulated_norm(
                x, modulation[:, 0], modulation[:, 1], layout.frame_video, layout, backend=use.modulated_norm
            )
            frame_given = context.frame_rows >= layout.num_videos
            x = torch.where(frame_given[layout.token_frame][:, None], again, x)
        return self.linear(x)
