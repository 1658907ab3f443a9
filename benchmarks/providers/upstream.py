"""ST-DiT-2 the way Open-Sora 1.1 computes it: the baseline of every comparison.

Written for this project from what upstream does, in its order of operations: dense batches only, each elementwise step
on its own, given and noised frames modulated separately and then selected, attention that materializes its scores with
a float32 softmax. As shipped, its configurations never turn flash attention on; `flash=True` is what they meant, with
upstream's rule that it serves only sequences longer than the batch. Text lengths are read back by the host, and
cross-attention is one call for all videos where PyTorch has one, as upstream does both.

Parameter names and shapes are upstream's, so the state dict of `STDiT2` loads.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pad, scaled_dot_product_attention

from opensora_fast.model import STDiT2, STDiT2Config
from opensora_fast.model.positions import position_embedding

from .attention_work import make_starts

Starts = tuple[Tensor, Tensor]  # of each video's tokens and of its text's, int32 [B + 1]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, C]; shift, scale [B, 1, C]."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def select_frames(x_mask: Tensor, noised: Tensor, given: Tensor) -> Tensor:
    """Picks for each frame of [B, T·S, C] the noised or the given version."""
    videos, frames = x_mask.shape
    noised, given = (x.unflatten(1, (frames, -1)) for x in (noised, given))
    return torch.where(x_mask[:, :, None, None], noised, given).flatten(1, 2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """x [B, heads, T, D], interleaved pairs."""
    positions = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).to(frequencies.dtype)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def self_attention(module: nn.Module, x: Tensor, frequencies: Tensor | None, flash: bool) -> Tensor:
    """x [sequences, length, C]."""
    sequences, length, channels = x.shape
    q, k, v = module.qkv(x).view(sequences, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if frequencies is not None:
        q, k = rotate(q, frequencies), rotate(k, frequencies)
    if module.q_norm is not None:
        q, k = rms_norm(q, module.q_norm.weight), rms_norm(k, module.k_norm.weight)
    if flash and length > sequences:
        attended = scaled_dot_product_attention(q, k, v)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attended = scores.float().softmax(dim=-1).to(q.dtype) @ v
    return module.proj(attended.transpose(1, 2).reshape(sequences, length, channels))


def varlen_starts(x: Tensor, text_lengths: list[int]) -> Starts | None:
    """What cross-attention needs for one call of PyTorch's attention for sequences of any lengths.

    None where one ordinary call takes all videos (texts equally long), and where PyTorch's takes nothing: on a CPU, in
    other types than those of half precision, before torch 2.10.

    Args:
        x: [B, N, C].
    """
    takes = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    if len(set(text_lengths)) == 1 or not takes or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    videos, tokens = x.shape[:2]
    return make_starts([tokens] * videos, x.device), make_starts(text_lengths, x.device)


def cross_attention(
    module: nn.Module, x: Tensor, text: Tensor, text_lengths: list[int], starts: Starts | None = None
) -> Tensor:
    """x [B, N, C]; text [M, C], the real tokens of all videos one after another.

    One call for all videos where there is one (see `varlen_starts`), as upstream's of xformers; else one for each.
    """
    videos, tokens = x.shape[:2]
    q = module.q_linear(x).unflatten(2, (module.num_heads, -1))
    k, v = module.kv_linear(text).view(text.shape[0], 2, module.num_heads, -1).unbind(1)
    if len(set(text_lengths)) == 1:
        k, v = (z.unflatten(0, (videos, -1)).transpose(1, 2) for z in (k, v))
        attended = scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
    elif starts is not None:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(q.flatten(0, 1), k, v, *starts, tokens, max(text_lengths)).unflatten(0, (videos, -1))
    else:
        texts = (z.transpose(0, 1)[None].split(text_lengths, dim=2) for z in (k, v))
        pieces = zip(q.transpose(1, 2).split(1), *texts, strict=True)
        attended = torch.cat([scaled_dot_product_attention(*piece) for piece in pieces]).transpose(1, 2)
    return module.proj(attended.flatten(2))


class UpstreamBlock(nn.Module):
    """One block; holds the modules of an `STDiT2Block` under the same names."""

    def __init__(self, own: nn.Module, frequencies: nn.Parameter, flash: bool):
        super().__init__()
        self.attn, self.attn_temp = own.attn, own.attn_temp
        self.cross_attn, self.mlp = own.cross_attn, own.mlp
        self.scale_shift_table = own.scale_shift_table
        self.scale_shift_table_temporal = own.scale_shift_table_temporal
        self.drop_path = nn.Identity()
        self.flash = flash
        self._frequencies = [frequencies]  # in a list, so that it is not a parameter of every block

    def forward(self, x, y, t, t_tmp, mask=None, x_mask=None, t0=None, t0_tmp=None, T=None, S=None, starts=None):
        """x [B, T·S, C]; y [1, M, C]; t, t0 [B, 6·C]; t_tmp, t0_tmp [B, 3·C]; mask: text lengths; x_mask [B, T]."""
        videos = x.shape[0]
        space = (self.scale_shift_table + t.view(videos, 6, -1)).chunk(6, dim=1)
        time = (self.scale_shift_table_temporal + t_tmp.view(videos, 3, -1)).chunk(3, dim=1)
        if x_mask is not None:
            space_given = (self.scale_shift_table + t0.view(videos, 6, -1)).chunk(6, dim=1)
            time_given = (self.scale_shift_table_temporal + t0_tmp.view(videos, 3, -1)).chunk(3, dim=1)
        else:
            space_given = time_given = [None] * 6

        def modulated(x: Tensor, shift, scale, shift_given, scale_given) -> Tensor:
            result = modulate(x, shift, scale)
            return result if x_mask is None else select_frames(x_mask, result, modulate(x, shift_given, scale_given))

        def gated(branch: Tensor, gate: Tensor, gate_given: Tensor | None) -> Tensor:
            return gate * branch if x_mask is None else select_frames(x_mask, gate * branch, gate_given * branch)

        h = modulated(x, *space[:2], *space_given[:2]).view(videos * T, S, -1)
        h = self_attention(self.attn, h, None, self.flash).view(videos, T * S, -1)
        x = x + self.drop_path(gated(h, space[2], space_given[2]))
        h = modulated(x, *time[:2], *time_given[:2])
        h = h.view(videos, T, S, -1).transpose(1, 2).reshape(videos * S, T, -1)
        h = self_attention(self.attn_temp, h, self._frequencies[0], self.flash)
        h = h.view(videos, S, T, -1).transpose(1, 2).reshape(videos, T * S, -1)
        x = x + self.drop_path(gated(h, time[2], time_given[2]))
        x = x + cross_attention(self.cross_attn, x, y[0], mask, starts)
        h = modulated(x, *space[3:5], *space_given[3:5])
        h = self.mlp.fc2(gelu(self.mlp.fc1(h), approximate="tanh"))
        return x + self.drop_path(gated(h, space[5], space_given[5]))


class UpstreamSTDiT2(nn.Module):
    """Same parameters, names and `forward` as `STDiT2`; the computation is upstream's."""

    def __init__(
        self, config: STDiT2Config, flash: bool = False, checkpointing: bool = False, own: STDiT2 | None = None
    ):
        """`own`: a model whose modules and parameters are shared, so that several baselines fit beside it."""
        super().__init__()
        own = STDiT2(config) if own is None else own
        for name, module in own.named_children():
            if name != "blocks":
                self.add_module(name, module)
        self.config = config
        self.flash = flash
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(UpstreamBlock(block, own.rope.freqs, flash) for block in own.blocks)
        self._own = [own]  # for its embedders and conditioning; in a list, so that its names do not come twice

    def forward(
        self, x, timestep, y, mask=None, x_mask=None, num_frames=None, height=None, width=None, ar=None, fps=None
    ):
        """As `STDiT2.forward`."""
        own, patch = self._own[0], self.config.patch_size[1]
        videos, _, frames, rows, columns = x.shape
        weight = self.x_embedder.proj.weight
        conditions = {
            "timestep": timestep,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "ar": ar,
            "fps": fps,
        }
        conditions = {name: own.read_condition(name, value, videos).to(x.device) for name, value in conditions.items()}
        scale = (conditions["height"][0].item() * conditions["width"][0].item()) ** 0.5 / self.config.input_sq_size

        x = pad(x.to(weight.dtype), (0, -columns % patch, 0, -rows % patch))
        x = self.x_embedder.proj(x)
        grid = x.shape[2:]
        S = grid[1] * grid[2]
        x = x.flatten(2).transpose(1, 2)
        rounded_to = x.dtype if self.config.upstream_rounding else torch.float32
        position = position_embedding(grid[1], grid[2], scale, self.config.hidden_size, x.device, rounded_to)
        x = (x.view(videos, frames, S, -1) + position.to(x.dtype)).view(videos, frames * S, -1)

        has_given = x_mask is not None
        noised, given, space, time = own.make_modulation(conditions, has_given)
        y = y.squeeze(1).to(weight.dtype)
        if self.training and self.y_embedder.dropout_probability > 0:
            y = self.y_embedder.drop(y, self.y_embedder.draw_dropped(videos))
        y = self.y_embedder.y_proj(y)
        if mask is None:
            lengths, text = [y.shape[1]] * videos, y.flatten(0, 1)
        else:
            mask = mask.to(y.device).repeat(videos // mask.shape[0], 1)
            text = y.masked_select(mask[:, :, None] != 0).view(-1, y.shape[-1])
            lengths = mask.sum(dim=1).tolist()

        space, time = space.flatten(1), time.flatten(1)
        arguments = (text[None], space[:videos], time[:videos], lengths, x_mask)
        arguments += (space[videos:], time[videos:]) if has_given else (None, None)
        # Without flash attention it is what others are checked against, and leaves no part of that to a newer kernel.
        starts = varlen_starts(x, lengths) if self.flash else None
        options = {} if starts is None else {"starts": starts}
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, *arguments, frames, S, use_reentrant=False, **options)
            else:
                x = block(x, *arguments, frames, S, **options)

        shift, scale = (self.final_layer.scale_shift_table + noised[:, None]).chunk(2, dim=1)
        x = modulate(x, shift, scale)
        if has_given:
            shift, scale = (self.final_layer.scale_shift_table + given[:, None]).chunk(2, dim=1)
            x = select_frames(x_mask, x, modulate(x, shift, scale))
        x = self.final_layer.linear(x)
        x = x.view(videos, frames, grid[1], grid[2], patch, patch, -1).permute(0, 6, 1, 2, 4, 3, 5)
        x = x.reshape(videos, -1, frames, grid[1] * patch, grid[2] * patch)
        return x[..., :rows, :columns].float()
