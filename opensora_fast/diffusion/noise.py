"""Drawing standard normal noise reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_noise_like(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like`.

    The generator may live on another device than `like` (a CPU generator gives the same noise for every device); the
    noise is then copied over. Without one, the default generator of like's device is used.
    """
    if generator is None:
        return torch.randn_like(like)
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return noise.to(like.device, non_blocking=True)
