"""A Linear on all tokens, multiplied by the library that the caller names.

    y = x Wᵀ + b          d_x = d_y W          dW = d_yᵀ x          db = Σ_N d_y

"torch" is `torch.nn.functional.linear` itself: cuBLAS on a GPU. "quack" multiplies y and d_x with quack-kernels, whose
default configuration took 1 to 12 % less time than cuBLAS for them on an H200 (N = 32768, bf16) and, with sums split
over the tokens, more for dW: so dW stays with cuBLAS. N tokens, C channels, K outputs.

CUDA graphs and compilers, as quack's source (0.6.5) has it: it launches on PyTorch's current stream, waits for nothing
and, as called here, tunes nothing. The first call of a dtype and kind of product builds a kernel (about two seconds;
kept on disk), the first of a shape a plan, so a graph can be captured after one call outside, as of the Triton kernels.
Compilers see `quack_product` as one node.

Replaces in ST-DiT-2: `qkv` and `proj` of a block; for `fc1` and `fc2` see `mlp`, for `q_linear` `project_residual`.

Limits: cuBLAS unless quack is named; quack takes float16 and bfloat16, C and K that are multiples of 8, and GPUs of
sm_90 and sm_100.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import calls
from .registration import differentiable_once, kernel_op, on_device, output_dtype

LINEAR_BACKENDS = ("torch", "quack")
QUACK_INSTALL = 'pip install "quack-kernels[cu13]==0.6.5" "nvidia-cutlass-dsl[cu13]==4.8.1"'
QUACK_DTYPES = (torch.float16, torch.bfloat16)
QUACK_ARCHITECTURES = ((9, 0), (10, 0))
QUACK_ALIGNMENT = 16  # bytes: of the first element, and of the distance of two rows

# (left [M, S], right [S, P], added [M, P] or None, bias [P] or None) → left @ right, with one of the two added or none
Multiply = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def multiply_with_torch(left: Tensor, right: Tensor, added: Tensor | None, bias: Tensor | None) -> Tensor:
    term = bias if added is None else added
    return left @ right if term is None else torch.addmm(term, left, right)


def multiply_with_quack(library: Any, left: Tensor, right: Tensor, added: Tensor | None, bias: Tensor | None) -> Tensor:
    """As `Multiply`, by the functions `gemm` and `gemm_add` of `library`, which is `quack.gemm_interface`."""
    left = as_quack_reads(left)
    # Either way round it is read as it stands: the weight in backward, its transpose in forward.
    right = as_quack_reads(right) if right.stride(1) == 1 else as_quack_reads(right.t()).t()
    bias = None if bias is None else as_quack_reads(bias)
    if added is None:
        return library.gemm(left, right, bias=bias, tuned=False)
    return library.gemm_add(left, right, as_quack_reads(added), bias=bias, tuned=False)


def as_quack_reads(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % QUACK_ALIGNMENT == 0 else tensor.clone()


@kernel_op("opensora_fast::quack_product")
def quack_product(left: Tensor, right: Tensor, added: Tensor | None, bias: Tensor | None) -> Tensor:
    library = prepare_quack(left, right.shape)
    with on_device(left):
        return multiply_with_quack(library, left, right, added, bias)


@quack_product.register_fake
def _(left, right, added, bias):
    return left.new_empty(left.shape[0], right.shape[1])


def prepare_quack(operand: Tensor, sizes: tuple[int, ...]) -> Any:
    """The module `quack.gemm_interface`, for products of such operands, of these sizes beside the tokens.

    Raises:
        ValueError: as `check_quack`.
    """
    check_quack(operand.device, operand.dtype, tuple(sizes))
    return load_quack()


def check_quack(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> None:
    """Raises ValueError where quack cannot multiply, with what to do.

    Args:
        device: of the operands.
        dtype: of the operands.
        sizes: C and K.
    """
    if device.type != "cuda":
        raise ValueError(f"linear: quack needs a CUDA GPU, and the tokens are on {device}; name 'torch' in its place")
    capability = _get_capability(device)
    if capability not in QUACK_ARCHITECTURES:
        raise ValueError(
            f"linear: quack is used on GPUs of sm_90 and sm_100, and {device} has sm_{capability[0]}{capability[1]}; "
            "name 'torch' in its place"
        )
    if dtype not in QUACK_DTYPES:
        raise ValueError(
            f"linear: quack takes float16 and bfloat16, got {dtype}; name 'torch' in its place, or use a model or "
            "autocast of half precision"
        )
    wrong = next((size for size in sizes if size * dtype.itemsize % QUACK_ALIGNMENT), None)
    if wrong is not None:
        raise ValueError(f"linear: quack needs channels in multiples of 8, got {wrong}; name 'torch' in its place")
    load_quack()


@functools.cache
def _get_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def load_quack() -> Any:
    """The module `quack.gemm_interface`.

    Raises:
        ValueError: it is not installed, or cannot be imported; with what to install.
    """
    try:
        version("quack-kernels")
    except PackageNotFoundError:
        raise ValueError(
            f"linear: quack is not installed; {QUACK_INSTALL} (these belong together), or name 'torch' in its place"
        ) from None
    try:
        return importlib.import_module("quack.gemm_interface")
    except Exception as error:  # its compiler's binary modules raise anything
        raise ValueError(
            f"linear: quack cannot be imported ({type(error).__name__}: {error}); {QUACK_INSTALL}, or name "
            "'torch' in its place"
        ) from error


def choose_multiply(op: str, backend: str) -> Multiply:
    """What multiplies for a call of `op`; "auto" is "torch", for nothing is chosen by what is installed.

    Raises:
        ValueError: an unknown backend.
    """
    if backend in ("auto", "torch"):
        return multiply_with_torch
    if backend != "quack":
        raise ValueError(f"{op}: backend {backend!r} is unknown; choose one of {', '.join(LINEAR_BACKENDS)}")
    if not torch.compiler.is_compiling():
        calls[op, backend] += 1
    return quack_product


def weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """dW = d_yᵀ x, contiguous [K, C]."""
    if is_made_transposed(d_y.shape[1], x.shape[1]):
        return (x.t() @ d_y).t().contiguous()
    return d_y.t() @ x


def is_made_transposed(rows: int, columns: int) -> bool:
    """Whether the transposed gradient of a weight of this size is made, and laid out anew.

    cuBLAS takes a fifth longer where a gradient has more columns than rows: 570 µs for 1152 × 4608 from 32768 tokens,
    473 for 4608 × 1152, the same products [H200].
    """
    return columns > rows


class Linear(torch.autograd.Function):
    """x [N, C], weight [K, C], bias [K] or None, multiply → y [N, K], in autocast's dtype where it is on.

    The gradient of the weight is left to PyTorch: `weight_gradient`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.multiply = multiply
        # Cast here: autocast would keep its copy of the weight, made where no gradients are recorded, for later uses.
        dtype = output_dtype(x, weight)
        return multiply(x.to(dtype), weight.to(dtype).t(), None, None if bias is None else bias.to(dtype))

    @staticmethod
    @differentiable_once("linear")
    def backward(ctx, d_y: Tensor):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if wants_x:
            d_x = ctx.multiply(d_y, weight.to(d_y.dtype), None, None).to(x.dtype)
        if wants_weight:
            d_weight = weight_gradient(d_y, x.to(d_y.dtype)).to(weight.dtype)
        if wants_bias:
            d_bias = d_y.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "torch") -> Tensor:
    """x Wᵀ + b.

    Args:
        x: [N, C].
        weight: [K, C].
        bias: [K] or None.
        backend: "torch" (or "auto"), which is `torch.nn.functional.linear`, or "quack".

    Returns:
        [N, K], in autocast's dtype where it is on.

    Raises:
        ValueError: an unknown backend; with quack also shapes that do not fit, by the argument's name, and where it is
            not installed or cannot multiply (see `check_quack`).
    """
    multiply = choose_multiply("linear", backend)
    if multiply is multiply_with_torch:
        return torch.nn.functional.linear(x, weight, bias)
    check_operands("linear", x, weight, bias)
    return Linear.apply(x, weight, bias, multiply)


def check_operands(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError where x [N, C], weight [K, C] and bias [K] or None do not fit."""
    check_tensor(op, "x", x, (None, None), x.device)
    check_tensor(op, "weight", weight, (None, x.shape[1]), x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), x.device)
