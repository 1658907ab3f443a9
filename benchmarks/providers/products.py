"""Every implementation of a Linear's matrix products that this machine may have, on the same operands.

Letters: N tokens, K and O the widths of a Linear before and behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opensora_fast.kernels.linear import is_made_transposed

from ..measuring.provider import Bound, Provider, needs_half, needs_module, own_version, version_of

FORWARD, OF_INPUT, OF_WEIGHT = DIRECTIONS = ("forward", "backward of input", "backward of weight")

# The gradient of a weight of 1152 × 1152 has 54 tiles of 128 × 192 for 132 multiprocessors, each summing over all
# tokens. As so many sums over a part of the tokens each, they fill it; float32 until they are added up.
TOKEN_SPLITS = 4
QUACK = ("quack-kernels", "quack_kernels")
OTHER_DIRECTIONS = "is for the gradient of a weight"


@dataclass(frozen=True)
class Product:
    """left [M, S] @ right [S, P], written into `output` [M, P]."""

    direction: str
    left: Tensor
    right: Tensor
    output: Tensor

    @property
    def device(self) -> str:
        return self.left.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype


def make_product(direction: str, x: Tensor, weight: Tensor, gradient: Tensor) -> Product:
    """One of DIRECTIONS for x [N, K], weight [O, K] and the gradient [N, O] of their product."""
    left, right = {
        FORWARD: (x, weight.T),
        OF_INPUT: (gradient, weight),
        OF_WEIGHT: (gradient.T, x),
    }[direction]
    return Product(direction, left, right, left.new_empty(left.shape[0], right.shape[1]))


def _prepare_library(product: Product) -> Bound:
    return partial(torch.mm, product.left, product.right, out=product.output)


def split_over_tokens(product: Product) -> Bound:
    """The gradient of a weight as `TOKEN_SPLITS` products of cuBLAS in one call, and their sum."""
    parts = (TOKEN_SPLITS, -1)
    left, right = product.left.T.unflatten(0, parts).transpose(1, 2), product.right.unflatten(0, parts)
    in_float32 = {} if product.dtype == torch.float32 else {"out_dtype": torch.float32}

    def call() -> Tensor:
        return product.output.copy_(torch.bmm(left, right, **in_float32).sum(0))

    return call


def transpose_product(product: Product) -> Bound:
    """The transposed gradient of a weight, laid out anew: as ours makes those that have more columns than rows."""

    def call() -> Tensor:
        return product.output.copy_(torch.mm(product.right.T, product.left.T).T)

    return call


def _is_for_weight(product: Product) -> str:
    """Empty, or why it is not."""
    return "" if product.direction == OF_WEIGHT else OTHER_DIRECTIONS


def _may_be_split(product: Product) -> str:
    if product.right.shape[0] % TOKEN_SPLITS:
        return _is_for_weight(product) or f"needs tokens in multiples of {TOKEN_SPLITS}, not {product.right.shape[0]}"
    return _is_for_weight(product)


def quack_version() -> str:
    """As in rows, "" where it is not installed: all of them have it untuned.

    It is measured, and used by ours, in its default configuration; finding the best of dozens takes minutes for each
    shape, and a training of many buckets has many.
    """
    version = version_of(QUACK)()
    return f"{version}, untuned" if version else ""


def _prepare_quack(product: Product, weight_splits: int) -> Bound:
    from quack.gemm_interface import gemm

    splits = weight_splits if product.direction == OF_WEIGHT else 1
    return partial(gemm, product.left, product.right, out=product.output, tuned=False, split_k=splits)


needs_quack = needs_module("quack.gemm_interface", QUACK, needs_half)


def _needs_quack_for_weight(product: Product) -> str:
    return _is_for_weight(product) or needs_quack(product)


def _prepare_own(product: Product) -> Bound:
    """As ours multiplies unless it is asked for quack."""
    if product.direction == OF_WEIGHT and is_made_transposed(*product.output.shape):
        return transpose_product(product)
    return _prepare_library(product)


LIBRARY = Provider("torch-cpu", _prepare_library)
CUBLAS = Provider("cublas", _prepare_library, version=lambda: f"CUDA {torch.version.cuda}")
QUACK_PRODUCTS = Provider("quack", partial(_prepare_quack, weight_splits=TOKEN_SPLITS), needs_quack, quack_version)
PRODUCT_PROVIDERS = {
    "cpu": (LIBRARY,),
    "cuda": (
        CUBLAS,
        Provider("cublas-split", split_over_tokens, _may_be_split, CUBLAS.version),
        Provider("cublas-transposed", transpose_product, _is_for_weight, CUBLAS.version),
        QUACK_PRODUCTS,
        Provider("quack-unsplit", partial(_prepare_quack, weight_splits=1), _needs_quack_for_weight, quack_version),
    ),
}

# Who makes all products of a block: name → by whom each of DIRECTIONS is made.
OWN = Provider("ours", _prepare_own, version=own_version)
BLOCK_PRODUCTS = {
    "cpu": {"torch-cpu": (LIBRARY,) * 3, "ours": (OWN,) * 3},
    "cuda": {
        "cublas": (CUBLAS,) * 3,
        "ours": (OWN,) * 3,
        "quack": (QUACK_PRODUCTS,) * 3,
        "ours-quack": (QUACK_PRODUCTS, QUACK_PRODUCTS, OWN),
    },
}
