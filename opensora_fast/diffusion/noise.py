"""Drawing standard normal noise reproducibly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_fast.device import send

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise_like(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like`.

    Args:
        like: [B, ...].
        generator: one, or one for each of the B rows, so that a row's noise does not depend on the other rows. It may
            live on another device than `like` (a CPU generator gives the same noise for every device); the noise is
            then copied over. None is the default generator of like's device.
    """
    if generator is None:
        return torch.randn_like(like)
    if not isinstance(generator, torch.Generator):
        if len(generator) != like.shape[0]:
            raise ValueError(f"{len(generator)} generators for {like.shape[0]} rows; give one, or one for each row")
        return torch.stack([draw_noise_like(row, own) for row, own in zip(like, generator, strict=True)])
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return send(noise, like.device)
