"""The two likelihood terms of the variational bound, and means over the frames that count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVEL = 1.0 / 255.0  # half the distance between two of 256 levels on [-1, 1]


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise; arguments broadcast."""
    # Summed in this order: for near-equal Gaussians the terms cancel, and another order shows in the loss.
    spread = -1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
    return 0.5 * (spread + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood in nats of x, taken as one of 256 levels on [-1, 1], under a Gaussian (DDPM equation 13).

    Args:
        x, mean: [B, ...], the targets and the means.
        log_scale: log of the standard deviation, broadcasts to x.

    Returns:
        Tensor like x. A level's probability is at least 1e-12, so the result is finite for finite arguments.
    """
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    below_upper_edge = _approximate_normal_cdf(inverse_scale * (centered + LEVEL))
    below_lower_edge = _approximate_normal_cdf(inverse_scale * (centered - LEVEL))
    # The outermost levels take the whole tail.
    probability = torch.where(x > 0.999, 1.0 - below_lower_edge, below_upper_edge - below_lower_edge)
    probability = torch.where(x < -0.999, below_upper_edge, probability)
    return torch.log(probability.clamp(min=1e-12))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation is part of the loss that the published weights were trained with.
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def mean_per_video(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over everything but the batch, of the noised frames only.

    Args:
        values: [B, C, T, H, W] (any [B, ...] without a mask).
        mask: bool [B, T], True for the frames that count; None counts all.

    Returns:
        [B]. A video in which no frame counts gives 0.
    """
    if mask is None:
        return values.flatten(1).mean(dim=1)
    per_frame = values.transpose(1, 2).flatten(2)  # [B, T, C * H * W]
    count = mask.sum(dim=1).clamp(min=1) * per_frame.shape[2]
    return (per_frame * mask.unsqueeze(2)).sum(dim=(1, 2)) / count
