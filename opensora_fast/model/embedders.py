"""Scalars, captions and positions as vectors of the model's width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

FREQUENCIES = 128  # cosine and sine of so many frequencies describe a scalar


def sinusoids(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values [B] → [B, 256]: cosines, then sines of value · exp(-ln(10000)·i/128), computed in float32."""
    exponent = torch.arange(FREQUENCIES, dtype=torch.float32, device=values.device) / FREQUENCIES
    angles = values.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class ScalarEmbedder(nn.Module):
    """Sinusoids, Linear, SiLU, Linear: timesteps, sizes, frame counts and frame rates."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """values [B, k] or [B] → [B, k·width]: the scalars of a row side by side."""
        embedded = self.mlp(sinusoids(values.reshape(-1), self.mlp[0].weight.dtype))
        return embedded.view(values.shape[0], -1)


class Projection(nn.Module):
    """fc1, tanh-GELU, fc2."""

    def __init__(self, width_in: int, width_hidden: int, width_out: int):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_hidden)
        self.fc2 = nn.Linear(width_hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text embeddings to the model's width; holds the unconditional caption.

    `y_embedding [L, caption channels]` stands for "no caption" in classifier-free guidance.
    """

    def __init__(self, caption_channels: int, width: int, dropout_probability: float, max_length: int):
        super().__init__()
        self.y_proj = Projection(caption_channels, width, width)
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)
        self.dropout_probability = dropout_probability

    def forward(self, y: Tensor) -> Tensor:
        """y [M, channels] → [M, C]."""
        return self.y_proj(y)

    def draw_dropped(self, count: int) -> Tensor:
        """Which of `count` captions are dropped, each with the dropout probability: bool [count] on the host.

        Drawn from torch's default generator of the host, so that it is the same for every device.
        """
        return torch.rand(count, device="cpu") < self.dropout_probability

    def drop(self, y: Tensor, dropped: Tensor) -> Tensor:
        """Replaces captions y [B, L, channels] by the unconditional one.

        Args:
            dropped: bool [B], which ones.

        Raises:
            ValueError: y is not padded to the model's text length, or `dropped` is not of B captions.
        """
        if y.shape[1:] != self.y_embedding.shape:
            raise ValueError(
                f"y: text of shape {tuple(y.shape[1:])} in training, expected {tuple(self.y_embedding.shape)}; "
                "pad captions to model_max_length"
            )
        if dropped.shape != y.shape[:1] or dropped.dtype != torch.bool:
            raise ValueError(
                f"dropped: {dropped.dtype} of shape {tuple(dropped.shape)} for {y.shape[0]} captions; give each a bool"
            )
        return torch.where(dropped.to(y.device, non_blocking=True)[:, None, None], self.y_embedding.to(y.dtype), y)


class PatchEmbedder(nn.Module):
    """The Linear behind `patchify`; its weight has the shape of upstream's strided convolution."""

    def __init__(self, channels: int, patch_size: tuple[int, int, int], width: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, channels·patch²] → [N, C]."""
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class RotaryFrequencies(nn.Module):
    """Frequencies 10000^(-2i/D) of the rotary embedding over frame indices, kept in the state dict as `rope.freqs`.

    rounding: let the frequencies follow the dtype of the model and keep the angles in it before cosine and sine are
    taken, as upstream does; False keeps both in float32.
    """

    def __init__(self, head_size: int, rounding: bool):
        super().__init__()
        exponents = torch.arange(0, head_size, 2).float() / head_size
        self.freqs = nn.Parameter(1.0 / 10000**exponents, requires_grad=False)
        self.rounding = rounding

    def _apply(self, fn, recurse=True):
        exact = self.freqs.data
        super()._apply(fn, recurse)
        if not self.rounding and not exact.is_meta:
            self.freqs.data = exact.to(self.freqs.device)
        return self


def rotary_tables(frequencies: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [frames, D/2], of frame index · frequency; angles have the dtype of the frequencies."""
    index = torch.arange(frames, device=frequencies.device)
    angles = (index.to(frequencies.dtype)[:, None] * frequencies).float()
    return angles.cos(), angles.sin()
