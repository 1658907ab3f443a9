"""Gradients of a Linear's bias, found by the op that makes the gradient of the Linear's output.

    x = linear(z, W, b.detach()); y = op(x, …, b)          db = Σ_N d_x

The value of b is in x already. Autograd alone would read d_x again for the sum; the programs that make d_x have it in
registers. For temporal and cross-attention, 4 of the 7 rows of 1152 numbers a token of a block of ST-DiT-2, they add it
up; in spatial attention, whose registers are full, that took 113 to 210 µs a layer on an H200 and a pass of its own 57
to 107, so that it is one. N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import differentiable_once


class _CollectBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    @differentiable_once("bias_gradient")
    def backward(ctx, d_x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        wants_x, wants_bias = ctx.needs_input_grad
        return d_x if wants_x else None, d_x.sum(0).to(ctx.bias_dtype) if wants_bias else None


def collect_bias_gradient_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, …] unchanged; `bias` [...], which x holds already, receives the sum of x's gradient over the tokens."""
    return x if bias is None else _CollectBiasGradient.apply(x, bias)
