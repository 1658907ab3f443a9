"""What the registered Triton ops share: how they are registered, the dtypes of what they return, and the device they
are launched on.

An op `<op>` is registered as `opensora_fast::<op>` with `kernel_op`, `register_fake` and `register_autograd`; its
backward is an op of its own, `opensora_fast::<op>_backward`, so that compilers see both as one node each. Registered
ops take tensors and numbers only: the tables of a `PackLayout` are passed one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import PLAIN_TYPES
from .dispatch import TRITON_DTYPES, is_intercepted

if __package__ != "opensora_fast.kernels":
    raise ImportError(f"{__package__}: import opensora_fast.kernels; an op can be registered under one name only")

# Of arguments that are what they look like; a subclass of Tensor may have its numbers elsewhere.
_PLAIN_ARGUMENTS = frozenset((*PLAIN_TYPES, type(None), bool, int, float, list, torch.dtype))


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for `backward` of an `autograd.Function`: refuses to make gradients that are to be differentiated.

    Behind PyTorch's own `once_differentiable` they lead nowhere: `torch.autograd.grad` for some tensors only, or
    `torch.autograd.functional.jvp`, leaves their part out without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def backward_once(ctx: Any, *gradients: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise ValueError(
                    f"{op}: it has no second derivatives, which create_graph=True and torch.autograd.functional.jvp "
                    "ask for; use the first only"
                )
            return backward(ctx, *gradients)

        return backward_once

    return decorate


class KernelOp:
    """A registered op whose eager calls go around the dispatcher.

    A call through `torch.library.custom_op` took 150 µs of CPU time for `gate_residual_modulated_norm` without its
    kernels, this one 41 (measured on a server CPU), and a step calls hundreds of ops. So a call on plain tensors runs
    the same functions as one `autograd.Function`; compilers, tracers and dispatch modes get the registered op.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name.partition("::")[2]
        self.function = function
        self.op = torch.library.custom_op(name, mutates_args=())(function)
        self._direct: Callable[..., Any] = function

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        return self.op.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Both as `torch.library.register_autograd` takes them."""
        self.op.register_autograd(backward, setup_context=setup_context)

        # One function, for a separate `setup_context` makes each call of `apply` inspect signatures.
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self.function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(differentiable_once(self.name)(backward))}
        made = type(self.function.__name__, (torch.autograd.Function,), members)
        # The `apply` below that of `Function`, which would look for wrappers of functorch in every argument: `__call__`
        # has asked already.
        self._direct = super(torch.autograd.Function, made).apply

    def __call__(self, *arguments: Any) -> Any:
        seen_by_others = (
            torch.compiler.is_compiling() or is_intercepted() or not _PLAIN_ARGUMENTS.issuperset(map(type, arguments))
        )
        if not seen_by_others:
            return self._direct(*arguments)
        # Tangents do not pass the registered op, which would say nothing of it; `_direct` refuses them itself.
        if forward_ad._current_level >= 0:
            raise ValueError(
                f"{self.name}: it has no derivatives in forward mode (torch.func.jvp, torch.autograd.forward_ad); use "
                "backend='reference', or backward()"
            )
        return self.op(*arguments)


def kernel_op(name: str) -> Callable[[Callable[..., Any]], KernelOp]:
    """Decorator: `@kernel_op("opensora_fast::<op>")` in the place of `@torch.library.custom_op(…, mutates_args=())`."""
    return functools.partial(KernelOp, name)


_AS_IT_IS = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


def promote(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that an expression of the tensors has in eager PyTorch."""
    dtype = None
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def output_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of an activation that a Linear reads next: what the tensors promote to, or autocast's where it is on.

    A Linear under autocast would cast it anyway; writing that dtype at once gives the same numbers and saves the bytes.
    """
    dtype = promote(*tensors)
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if dtype in TRITON_DTYPES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor as kernels read it; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def empty_as(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized contiguous tensor like `like`; `torch.empty` with shape and device takes four times as long."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def empty_if(wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `empty_as`; of no elements where it is not wanted, for ops return tensors."""
    return empty_as(like, dtype) if wanted else like.new_empty(0, dtype=dtype)
