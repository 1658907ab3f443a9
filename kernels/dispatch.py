"""Which implementation of an op runs, and a count of those that did.

Every op has two implementations with one meaning: `reference` (plain PyTorch, any device) and `triton`. The caller
chooses with `backend`; "auto" means Triton on CUDA and the reference elsewhere. Nothing falls back in silence: what
runs is counted in `calls`, and a choice that cannot run raises.
"""

from __future__ import annotations

import os
from collections import Counter

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (op, backend) → how often it was called in this process; a run prints it. Calls from a graph of torch.compile are not
# counted: the graph would depend on the count and be compiled anew for every call.
calls: Counter[tuple[str, str]] = Counter()


def interpreting() -> bool:
    """True when Triton was started with TRITON_INTERPRET=1, which runs its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_intercepted() -> bool:
    """True under a dispatch mode or a transform of torch.func: each call of PyTorch's goes through it, and a new tensor
    may be a stand-in."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def check_triton(name: str, device: torch.device) -> None:
    """ValueError, which begins with a name, where Triton's kernels cannot run on the tensors of a device."""
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"{name}: Triton kernels need CUDA tensors, got {device}; use 'reference' or 'auto', or set "
            "TRITON_INTERPRET=1 before Python starts to run them slowly on the CPU"
        )


def check_backend(op: str, backend: str) -> None:
    """ValueError for a backend that there is not."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def choose_backend(op: str, backend: str, tensor: Tensor, *others: Tensor | None) -> str:
    """Returns "reference" or "triton" for a call of `op` on these tensors, and counts it; "auto" takes the reference
    where one of them is float64.

    Raises:
        ValueError: an unknown backend, or Triton asked for where it cannot run: no CUDA, or a dtype it does not take.
    """
    check_backend(op, backend)
    if backend != "reference":
        refused = [each.dtype for each in (tensor, *others) if each is not None and each.dtype not in TRITON_DTYPES]
        if backend == "auto":
            backend = "triton" if tensor.is_cuda and not refused else "reference"
        elif refused:
            raise ValueError(f"{op}: its Triton kernel takes float32, float16 and bfloat16, got {refused[0]}")
        else:
            check_triton(op, tensor.device)
    if not torch.compiler.is_compiling():
        calls[op, backend] += 1
    return backend
