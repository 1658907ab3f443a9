"""Rotary embedding, then RMS norm, of queries or keys: upstream's order.

    rotated[2i]   = z[2i] · cos[i] - z[2i+1] · sin[i]
    rotated[2i+1] = z[2i+1] · cos[i] + z[2i] · sin[i]        (interleaved pairs, all D dimensions)
    y = weight · rotated / sqrt(mean(rotated²) + eps)         (statistics in float32, the weight after the cast back)

Replaces in ST-DiT-2: `rope` (temporal attention only), `q_norm` and `k_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input, so that the reference can serve as a measuring stick."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_reference(z: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """z [..., D], weight [D] or None for no norm at all."""
    if weight is None:
        return z
    wide = z.to(statistics_dtype(z.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(z.dtype)


def rotary_reference(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """z [..., D]; cos, sin broadcastable to [..., D/2]."""
    wide = z.to(statistics_dtype(z.dtype))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(z.dtype)
