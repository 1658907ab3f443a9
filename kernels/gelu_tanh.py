"""Bias and tanh-GELU in one pass.

    y = 0.5 · z · (1 + tanh(sqrt(2/π) · (z + 0.044715 · z³))),   z = x + bias

Replaces in ST-DiT-2: the bias of `mlp.fc1` and the activation behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import choose


def gelu_tanh_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Applies tanh-GELU to `x + bias`.

    Args:
        x: [N, K], output of a matrix product.
        bias: [K] or None.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, K].

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_tensor("gelu_tanh", "x", x, (None, None), x.device)
    if bias is not None:
        check_tensor("gelu_tanh", "bias", bias, (x.shape[1],), x.device)
    choose("gelu_tanh", backend, x, has_triton=False)
    return gelu_tanh_reference(x, bias)
