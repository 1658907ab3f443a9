"""A Linear on a residual stream that goes on beside it: the two gradients of the stream meet in the matrix product.

    y = x Wᵀ + b          d_x = d_x_on + d_y W          dW = d_yᵀ x          db = Σ_N d_y

Autograd alone would write d_y W and add it to d_x_on in a pass of its own, 3 rows read or written for each token. As
the product's epilogue (beta = 1) the sum costs one read, and it is rounded once; cuBLAS adds to its output, so PyTorch
copies d_x_on there first, and quack reads it where it is. N tokens, C channels, K outputs.

Replaces in ST-DiT-2: `cross_attn.q_linear` and the residual connection around cross-attention.

Limits: plain PyTorch on purpose, cuBLAS does the work, or quack where it is named (see `linear`); one epilogue only
where x, y and W have one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import Multiply, check_operands, choose_multiply, weight_gradient
from .registration import differentiable_once, output_dtype


class ProjectResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Multiply) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.multiply = multiply
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        # Cast here: autocast would keep its copy of the weight, made where no gradients are recorded, for later uses.
        dtype = output_dtype(x, weight)
        bias = None if bias is None else bias.to(dtype)
        return x.view_as(x), multiply(x.to(dtype), weight.to(dtype).t(), None, bias)

    @staticmethod
    @differentiable_once("project_residual")
    def backward(ctx, d_on: Tensor | None, d_y: Tensor | None):
        x, weight = ctx.saved_tensors
        if d_y is None:
            return d_on, None, None, None
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if wants_x:
            # Under autocast y is of half precision while x and W may not be.
            if d_on is not None and d_on.dtype == d_y.dtype == weight.dtype:
                d_x = ctx.multiply(d_y, weight, d_on, None)
            else:
                d_x = ctx.multiply(d_y, weight.to(d_y.dtype), None, None).to(x.dtype)
                d_x = d_x if d_on is None else d_on + d_x
        if wants_weight:
            d_weight = weight_gradient(d_y, x.to(d_y.dtype)).to(weight.dtype)
        if wants_bias:
            d_bias = d_y.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None


def project_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Applies a Linear to a residual stream.

    Args:
        x: [N, C] the stream.
        weight: [K, C].
        bias: [K] or None.
        backend: what multiplies y and d_x: "torch" (or "auto") or "quack", as in `linear`.

    Returns:
        (x [N, C] to go on with, x Wᵀ + b [N, K] in autocast's dtype where it is on). Use the returned x in place of
        the given one, else its gradient is added up apart.

    Raises:
        ValueError: shapes that do not fit, by the argument's name; a backend that is unknown or cannot multiply here.
    """
    check_operands("project_residual", x, weight, bias)
    return ProjectResidual.apply(x, weight, bias, choose_multiply("project_residual", backend))
