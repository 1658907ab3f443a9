"""A block's MLP without its second bias, which belongs to the gate behind it.

    h = x W1ᵀ + b1        y = gelu(h) W2ᵀ        gelu: `gelu_tanh`
    d_h = (d_y W2) · gelu'(h)        d_x = d_h W1        dW1 = d_hᵀ x        db1 = Σ_N d_h        dW2 = d_yᵀ gelu(h)

"torch" is two Linears of PyTorch with `gelu_tanh` between them. quack's products end with the GELU: forward the first
writes h and gelu(h), backward the one that makes d_h reads h and writes gelu(h) again. So nothing but h is kept for
backward, K numbers a token less than "torch" keeps, and no pass of its own reads and writes [N, K] for the GELU; where
no gradient is to be had, h is not even written. dW1 and dW2 stay with cuBLAS, for the reason in `linear`, and dW2 is
made as `linear.weight_gradient` has it. N tokens, C channels, K hidden channels.

CUDA graphs and compilers: as for `linear`. Compilers see each product as one node.

Replaces in ST-DiT-2: `mlp.fc1`, the activation and the product of `mlp.fc2`.

Limits: cuBLAS and `gelu_tanh` unless quack is named; with quack those of `linear`, for C and K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_tensor
from .dispatch import check_backend
from .gelu_tanh import gelu_tanh
from .linear import Linear, as_quack_reads, choose_multiply, prepare_quack, quack_product, weight_gradient
from .registration import differentiable_once, empty_as, empty_if, kernel_op, on_device, output_dtype

QUACK_GELU = "gelu_tanh_approx"  # gelu_tanh's formula, by the name it has in quack


@kernel_op("opensora_fast::quack_gelu")
def quack_gelu(x: Tensor, weight: Tensor, bias: Tensor, keeps_input: bool) -> tuple[Tensor, Tensor]:
    """x [N, C], weight [K, C], bias [K] → (h = x Wᵀ + b, gelu(h)), [N, K] each; h is empty if it is not kept."""
    library = prepare_quack(x, weight.shape)
    with on_device(x):
        h, activated = library.gemm_act(
            as_quack_reads(x),
            as_quack_reads(weight).t(),
            bias=as_quack_reads(bias),
            activation=QUACK_GELU,
            store_preact=keeps_input,
            tuned=False,
        )
    return h if keeps_input else x.new_empty(0), activated


@quack_gelu.register_fake
def _(x, weight, bias, keeps_input):
    activated = x.new_empty(x.shape[0], weight.shape[0])
    return empty_if(keeps_input, activated), activated


@kernel_op("opensora_fast::quack_gelu_backward")
def quack_gelu_backward(d_y: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """d_y [N, C], weight [C, K], h [N, K] → ((d_y W) · gelu'(h), gelu(h)), [N, K] each; quack always writes both."""
    library = prepare_quack(d_y, weight.shape)
    with on_device(d_y):
        return library.gemm_dact(
            as_quack_reads(d_y), as_quack_reads(weight), as_quack_reads(h), activation=QUACK_GELU, tuned=False
        )


@quack_gelu_backward.register_fake
def _(d_y, weight, h):
    return empty_as(h), empty_as(h)


class QuackMLP(torch.autograd.Function):
    """x [N, C], weight1 [K, C], bias1 [K], weight2 [C, K], differentiates → y [N, C], in autocast's dtype where it is
    on."""

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, differentiates: bool) -> Tensor:
        # Cast here: autocast would keep its copies of the weights, made where no gradients are recorded, for later
        # uses.
        dtype = output_dtype(x, weight1)
        h, activated = quack_gelu(x.to(dtype), weight1.to(dtype), bias1.to(dtype), differentiates)
        ctx.save_for_backward(x, weight1, weight2, h)
        ctx.bias_dtype = bias1.dtype
        return quack_product(activated, weight2.to(dtype).t(), None, None)

    @staticmethod
    @differentiable_once("mlp")
    def backward(ctx, d_y: Tensor):
        x, weight1, weight2, h = ctx.saved_tensors
        wants_x, wants_weight1, wants_bias1, wants_weight2, _ = ctx.needs_input_grad
        d_x = d_weight1 = d_bias1 = d_weight2 = None
        d_h, activated = quack_gelu_backward(d_y, weight2.to(d_y.dtype), h)
        if wants_weight2:
            d_weight2 = weight_gradient(d_y, activated).to(weight2.dtype)
        del activated
        if wants_weight1:
            d_weight1 = weight_gradient(d_h, x.to(d_h.dtype)).to(weight1.dtype)
        if wants_bias1:
            d_bias1 = d_h.sum(0).to(ctx.bias_dtype)
        if wants_x:
            d_x = quack_product(d_h, weight1.to(d_h.dtype), None, None).to(x.dtype)
        return d_x, d_weight1, d_bias1, d_weight2, None


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *, gelu: str = "auto", linear: str = "torch"
) -> Tensor:
    """gelu_tanh(x W1ᵀ + b1) W2ᵀ.

    Args:
        x: [N, C].
        weight1: [K, C].
        bias1: [K].
        weight2: [C, K].
        gelu: the backend of `gelu_tanh` where PyTorch multiplies; quack's products do the GELU themselves.
        linear: "torch" (or "auto") or "quack".

    Returns:
        [N, C], in autocast's dtype where it is on.

    Raises:
        ValueError: an unknown backend; with quack also shapes that do not fit, by the argument's name, and where it is
            not installed or cannot multiply (see `linear.check_quack`).
    """
    multiply = choose_multiply("mlp", linear)
    if multiply is not quack_product:
        hidden = gelu_tanh(functional.linear(x, weight1), bias1, backend=gelu)
        return Linear.apply(hidden, weight2, None, multiply)
    check_backend("gelu_tanh", gelu)
    check_tensor("mlp", "x", x, (None, None), x.device)
    check_tensor("mlp", "weight1", weight1, (None, x.shape[1]), x.device)
    check_tensor("mlp", "bias1", bias1, (weight1.shape[0],), x.device)
    check_tensor("mlp", "weight2", weight2, (x.shape[1], weight1.shape[0]), x.device)
    inputs = x, weight1, bias1, weight2
    differentiates = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return QuackMLP.apply(*inputs, differentiates)
