"""A Linear on a residual stream that goes on beside it: the two gradients of the stream meet in the matrix product.

    y = x Wᵀ + b          d_x = d_x_on + d_y W          dW = d_yᵀ x          db = Σ_N d_y

Autograd alone would write d_y W and add it to d_x_on in a pass of its own, 3 rows read or written for each token. As
the product's epilogue (cuBLAS's beta = 1) the sum costs one read, and it is rounded once. N tokens, C channels, K
outputs.

Replaces in ST-DiT-2: `cross_attn.q_linear` and the residual connection around cross-attention.

Limits: plain PyTorch on purpose, cuBLAS does the work; one epilogue only where x, y and W have one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .checks import check_tensor
from .registration import output_dtype


class _ProjectResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        # Cast here: autocast would keep its copy of the weight, made where no gradients are recorded, for later uses.
        dtype = output_dtype(x, weight)
        return x.view_as(x), linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_on: Tensor | None, d_y: Tensor | None):
        x, weight = ctx.saved_tensors
        if d_y is None:
            return d_on, None, None
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if wants_x:
            # Under autocast y is of half precision while x and W may not be.
            if d_on is not None and d_on.dtype == d_y.dtype == weight.dtype:
                d_x = torch.addmm(d_on, d_y, weight)
            else:
                d_x = (d_y @ weight.to(d_y.dtype)).to(x.dtype)
                d_x = d_x if d_on is None else d_on + d_x
        if wants_weight:
            d_weight = (d_y.t() @ x.to(d_y.dtype)).to(weight.dtype)
        if wants_bias:
            d_bias = d_y.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias


def project_residual(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Applies a Linear to a residual stream.

    Args:
        x: [N, C] the stream.
        weight: [K, C].
        bias: [K] or None.

    Returns:
        (x [N, C] to go on with, x Wᵀ + b [N, K] in autocast's dtype where it is on). Use the returned x in place of
        the given one, else its gradient is added up apart.

    Raises:
        ValueError: shapes that do not fit, by the argument's name.
    """
    check_tensor("project_residual", "x", x, (None, None), x.device)
    check_tensor("project_residual", "weight", weight, (None, x.shape[1]), x.device)
    if bias is not None:
        check_tensor("project_residual", "bias", bias, (weight.shape[0],), x.device)
    return _ProjectResidual.apply(x, weight, bias)
