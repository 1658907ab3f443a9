"""Every implementation of a block's MLP that this machine may have, on the same inputs: do fused epilogues pay?

`ours` leaves the matrix products to cuBLAS and does the bias and GELU between them in one pass of its own. Libraries
whose products end with an epilogue save that pass: 4 of the 12 rows of C elements that go to memory between the two
products forward, and 8 of 16 backward. `quack` is its own MLP; `ours-quack` leaves it all but the gradients of the
weights, which cuBLAS does faster. Both have quack's default configuration, untuned (see `products.quack_version`).

Letters: N tokens, C channels, K channels between the two Linears.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from opensora_fast import kernels
from opensora_fast.costs.operations import Count

from ..measuring.provider import (
    Bound,
    Provider,
    compiled,
    compiles_on_cuda,
    needs_cuda,
    needs_half,
    needs_module,
    of_function,
    own_version,
    version_of,
)
from .elementwise import APEX
from .op_work import OpWork
from .products import QUACK, needs_quack, quack_version
from .variants import VARIANT_OF


@dataclass(frozen=True)
class MLPWork(OpWork):
    """Inputs of the MLP, leaves all of them: x [N, C], weight1 [K, C], bias1 [K], weight2 [C, K].

    The bias of the second Linear is left out, as it belongs to the gate behind it.
    """

    leaves: dict[str, Tensor]


def make_mlp_work(tokens: int, channels: int, hidden: int, device: str, dtype: torch.dtype) -> MLPWork:
    """Random inputs; the weights keep the variance of what passes through them."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return values.to(dtype).requires_grad_()

    return MLPWork(
        {
            "x": draw(tokens, channels),
            "weight1": draw(hidden, channels, scale=channels**-0.5),
            "bias1": draw(hidden),
            "weight2": draw(channels, hidden, scale=hidden**-0.5),
        }
    )


def count_mlp(tokens: int, channels: int, hidden: int, element: int) -> tuple[Count, Count]:
    """(forward, forward and backward): products, and bytes of a schedule with fused epilogues.

    Each product reads its operands and writes its results once: forward what is before and behind the GELU, then y;
    backward the gradient before the GELU (which also reads what is before it), of weight2, of x and of weight1.
    """
    flops = 4.0 * tokens * channels * hidden
    weights = 2 * channels * hidden
    forward = element * (tokens * (2 * channels + 3 * hidden) + weights)
    backward = element * (tokens * (4 * channels + 5 * hidden) + 2 * weights)
    return Count(flops, float(forward)), Count(3 * flops, float(forward + backward))


def eager_call(work: MLPWork) -> Tensor:
    leaves = work.leaves
    hidden = gelu(linear(leaves["x"], leaves["weight1"], leaves["bias1"]), approximate="tanh")
    return linear(hidden, leaves["weight2"])


def own_call(work: MLPWork, backend: str, linear: str = "torch") -> Tensor:
    """As `opensora_fast.model.block` computes it."""
    x, weight1, bias1, weight2 = work.leaves.values()
    return kernels.mlp(x, weight1, bias1, weight2, gelu=backend, linear=linear)


def prepare_apex(work: MLPWork) -> Bound:
    """cuBLASLt's epilogues. Its GELU is the tanh approximation, and its second bias is not optional."""
    from apex.fused_dense import fused_dense_gelu_dense_function

    x, weight1, bias1, weight2 = work.leaves.values()
    zeros = weight2.new_zeros(weight2.shape[0])
    return lambda: fused_dense_gelu_dense_function(x, weight1, bias1, weight2, zeros)


def quack_call(work: MLPWork) -> Tensor:
    """Products whose epilogue is the GELU, or its gradient, in their default configuration.

    quack takes functions for those of an installed library where their files lie under a folder named site-packages or
    dist-packages; elsewhere (`pip install --target`) it follows all that they refer to, and fails with a TypeError.
    """
    from quack.mlp import mlp_func

    x, weight1, bias1, weight2 = work.leaves.values()
    return mlp_func(x, weight1, weight2, "gelu_tanh_approx", bias1=bias1, tuned=False)


def _prepare_compiled(work: MLPWork) -> Bound:
    function = compiled(eager_call)
    return lambda: function(work)


MLP_PROVIDERS = (
    Provider("eager", of_function(eager_call)),
    Provider("compile", _prepare_compiled, compiles_on_cuda),
    Provider("apex", prepare_apex, needs_module("apex.fused_dense", APEX), version_of(APEX)),
    Provider("quack", of_function(quack_call), needs_module("quack.mlp", QUACK, needs_half), quack_version),
    Provider("ours", of_function(lambda work: own_call(work, "triton")), needs_cuda, own_version),
    Provider(
        "ours-quack",
        of_function(lambda work: own_call(work, "triton", "quack")),
        needs_quack,
        VARIANT_OF["ours-quack"].version,
    ),
)
MLP_REFERENCE = MLP_PROVIDERS[0]
