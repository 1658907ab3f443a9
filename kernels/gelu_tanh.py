"""Bias and tanh-GELU in one pass.

    y = 0.5 · z · (1 + tanh(sqrt(2/π) · (z + 0.044715 · z³))),   z = x + bias

Replaces in ST-DiT-2: the bias of `mlp.fc1` and the activation behind it.

Kernels: rows/gelu_tanh.py. Limits: float32, float16, bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import choose_backend
from .registration import empty_as, empty_if, kernel_op, output_dtype


def gelu_tanh_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Applies tanh-GELU to `x + bias`.

    Args:
        x: [N, K], output of a matrix product.
        bias: [K] or None.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        [N, K] in the dtype that x and bias promote to; under autocast in autocast's, which the Linear behind it would
        cast it to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_tensor("gelu_tanh", "x", x, (None, None), None)
    if bias is not None:
        check_tensor("gelu_tanh", "bias", bias, (x.shape[1],), x.device)
    dtype = output_dtype(x, bias)
    if choose_backend("gelu_tanh", backend, x, bias) == "reference":
        return gelu_tanh_reference(x, bias).to(dtype)
    return _gelu_tanh(x, bias, dtype)


# ---- registration ----


@kernel_op("opensora_fast::gelu_tanh")
def _gelu_tanh(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from .rows.gelu_tanh import launch_forward

    y = empty_as(x, dtype)
    launch_forward(x, bias, y)
    return y


@_gelu_tanh.register_fake
def _(x, bias, dtype):
    return empty_as(x, dtype)


@kernel_op("opensora_fast::gelu_tanh_backward")
def _gelu_tanh_backward(
    d_y: Tensor, x: Tensor, bias: Tensor | None, wants_x: bool, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns (d_x [N, K], d_bias [K]); those that are not wanted are empty."""
    from .rows.gelu_tanh import launch_backward

    d_x, d_bias = _allocate_gradients(x, bias, wants_x, wants_bias)
    launch_backward(d_y, x, bias, d_x if wants_x else None, d_bias if wants_bias else None)
    return d_x, d_bias


@_gelu_tanh_backward.register_fake
def _(d_y, x, bias, wants_x, wants_bias):
    return _allocate_gradients(x, bias, wants_x, wants_bias)


def _allocate_gradients(x: Tensor, bias: Tensor | None, wants_x: bool, wants_bias: bool) -> tuple[Tensor, Tensor]:
    return empty_if(wants_x, x), empty_if(wants_bias, x if bias is None else bias)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, _ = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, d_y):
    wants_x, wants_bias, _ = ctx.needs_input_grad
    d_x, d_bias = _gelu_tanh_backward(d_y, *ctx.saved_tensors, wants_x, wants_bias)
    return d_x if wants_x else None, d_bias if wants_bias else None, None


_gelu_tanh.register_autograd(_backward, setup_context=_setup_context)
