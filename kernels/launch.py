"""Launches of Triton kernels that find the compiled kernel by one look-up.

`kernel[grid](…)` binds some twenty arguments by name, asks Triton's own library about each of them and makes a string
of the options: 19 µs of CPU time for the backward of the norms without its kernel, this one 9 (measured on a
server CPU). A step launches hundreds of kernels.

Triton compiles a kernel anew where a pointer's dtype changes or whether it is a multiple of 16 bytes, where an integer
becomes 1, a multiple of 16 or larger than 32 bits, where an argument is None, and for each set of constexprs and build
options. Calls that agree in all of these would find the same compiled kernel, so they take the one that the first of
them got from Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .registration import on_device

Argument = Tensor | int | float | None

# Of all builds. By itself Triton asks the environment (TRITON_DEFAULT_FP_FUSION), and from 3.10 on would take False:
# products and sums rounded apart, in twice the instructions.
BUILD_OPTIONS = {"enable_fp_fusion": True}

# What Triton's own cache holds, by the signature of `launch`: the compiled kernel and the values of its constexprs.
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], on: Tensor, arguments: tuple[Argument, ...], constants: dict[str, Any]
) -> None:
    """Runs `kernel[grid](*arguments, **constants, **BUILD_OPTIONS)` on the device of a tensor.

    Args:
        kernel: a `@triton.jit` function whose constexprs come last.
        grid: one to three numbers of programs.
        on: a tensor on that device.
        arguments: all that are not constexprs, in the kernel's order.
        constants: all constexprs of the kernel, and build options.
    """
    signature = (
        kernel.fn,
        on.get_device(),
        *[
            (argument.dtype, argument.data_ptr() % 16) if type(argument) is Tensor else _kind(argument)
            for argument in arguments
        ],
        *constants.items(),
    )
    found = _compiled.get(signature)
    with on_device(on):
        if found is not None:
            compiled, values = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)
            return
        compiled = kernel[grid](*arguments, **constants, **BUILD_OPTIONS)
    if compiled is not None:  # as it is under the interpreter
        _compiled[signature] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def ceil_divide(number: int, divisor: int) -> int:
    """As `triton.cdiv`, which is for kernels too and takes 1.5 µs."""
    return -(-number // divisor)


@lru_cache(maxsize=64)
def count_multiprocessors(device: torch.device) -> int:
    """1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _kind(argument: Argument) -> Any:
    if argument is None or type(argument) is float:
        return type(argument)
    if isinstance(argument, int):
        return (argument == 1, argument % 16 == 0) if -(2**31) <= argument < 2**31 else argument
    return argument.dtype, argument.data_ptr() % 16  # a parameter
