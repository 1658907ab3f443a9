"""Frame masks for training: which frames of a clip the model is given, and which it learns to generate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opensora_fast.config.sections import check_mask_ratios


class MaskGenerator:
    """Draw frame masks of nine kinds.

    "random", "head", "tail" and "head_tail" say where the given frames are; "image" is one frame (at each end), and
    "quarter" 1 to T/4 frames, uniformly drawn (one frame in clips of 2 or 3).

    Args:
        mask_ratios: the probability of each kind; kinds that are left out have 0. They must sum to 1.
    """

    def __init__(self, mask_ratios: Mapping[str, float]) -> None:
        try:
            check_mask_ratios(mask_ratios)
        except ValueError as error:
            raise ValueError(f"mask_ratios: {error}") from None
        self.mask_ratios = dict(mask_ratios)

    def get_masks(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One mask for each of the B videos of x [B, C, T, H, W]: bool [B, T] on its device, False for given frames.

        Args:
            generator: a CPU generator; the default one if None.
        """
        masks = [self.draw(x.shape[2], generator) for _ in range(x.shape[0])]
        return torch.stack(masks).to(x.device, non_blocking=True)

    def get_mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One mask for x [B, C, T, H, W]: bool [T] on its device, False for given frames."""
        return self.draw(x.shape[2], generator).to(x.device, non_blocking=True)

    def draw(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        """One mask for a clip of `num_frames` frames: bool [num_frames] on the CPU, False for given frames.

        A single frame is never given. In a clip of two frames, head_tail gives both.
        """
        mask = torch.ones(num_frames, dtype=torch.bool, device="cpu")
        kind = self._draw_kind(generator)
        if num_frames <= 1 or kind == "mask_no":
            return mask
        _, extent, place = kind.split("_", 2)
        length = 1 if extent == "image" else _draw_integer(1, max(1, num_frames // 4), generator)
        if place == "random":
            start = _draw_integer(0, num_frames - length, generator)
            mask[start : start + length] = False
        if place in ("head", "head_tail"):
            mask[:length] = False
        if place in ("tail", "head_tail"):
            mask[-length:] = False
        return mask

    def _draw_kind(self, generator: torch.Generator | None) -> str:
        draw = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
        threshold = 0.0
        for kind, ratio in self.mask_ratios.items():
            threshold += ratio
            if draw < threshold:
                return kind
        return "mask_no"  # the ratios sum to a hair less than 1


def _draw_integer(low: int, high: int, generator: torch.Generator | None) -> int:
    """A uniform integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))
