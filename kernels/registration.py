"""What the registered Triton ops share: which dtypes they take, and the device they are launched on.

An op `<op>` is registered as `opensora_fast::<op>` with `torch.library.custom_op`, `register_fake` and
`register_autograd`; its backward is an op of its own, `opensora_fast::<op>_backward`, so that compilers see both as one
node each. Registered ops take tensors and numbers only: the tables of a `PackLayout` are passed one by one.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .dispatch import choose

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose_backend(op: str, backend: str, *tensors: Tensor | None) -> str:
    """As `dispatch.choose` for the first tensor; "auto" takes the reference where a tensor is float64.

    Raises:
        ValueError: an unknown backend, or Triton asked for where it cannot run: no CUDA, or a dtype it does not take.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    other = next((tensor.dtype for tensor in given if tensor.dtype not in TRITON_DTYPES), None)
    if other is not None and backend == "triton":
        raise ValueError(f"{op}: its Triton kernel takes float32, float16 and bfloat16, got {other}")
    return choose(op, backend, given[0], has_triton=other is None)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def promote(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that an expression of the tensors has in eager PyTorch."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, given)


def output_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of an activation that a Linear reads next: what the tensors promote to, or autocast's where it is on.

    A Linear under autocast would cast it anyway; writing that dtype at once gives the same numbers and saves the bytes.
    """
    dtype = promote(*tensors)
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if dtype in TRITON_DTYPES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def empty_if(wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized contiguous tensor like `like`; of no elements where it is not wanted, for ops return tensors."""
    return torch.empty(like.shape if wanted else (0,), dtype=dtype or like.dtype, device=like.device)
