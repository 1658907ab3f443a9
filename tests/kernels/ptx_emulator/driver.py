"""Stands in for Triton's driver: `kernel[grid](…)` builds for sm_90 and runs on tensors in the host's memory."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from . import machine
from .program import parse

# Kernel → how often it was run.
launches: Counter[str] = Counter()


@contextmanager
def emulate(kind: type[machine.Machine] = machine.Machine) -> Iterator[None]:
    """Within it Triton's kernels run on CPU tensors, unless Triton was set to interpret when it was imported.

    `kind` is the machine that runs them.
    """
    initialize = CompiledKernel._init_handles

    def keep_ptx(kernel: CompiledKernel) -> None:
        initialize(kernel)
        kernel._run.ptx, kernel._run.kind = kernel.asm["ptx"], kind

    with patch.object(driver, "_active", _Driver()), patch.object(CompiledKernel, "_init_handles", keep_ptx):
        yield


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """module, function, registers, spills, threads: nothing is loaded."""
        return 1, 1, 0, 0, 1024


class _Launcher:
    """What Triton calls to launch one build of a kernel."""

    ptx: str
    kind: type[machine.Machine]

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = [kind for kind in source.signature.values() if kind != "constexpr"]
        self._constant = [kind == "constexpr" for kind in source.signature.values()]
        self._shared = metadata.shared

    def __call__(self, columns: int, rows: int, layers: int, *others: Any) -> None:
        given = others[-len(self._constant) :]
        arguments = [value for value, constant in zip(given, self._constant, strict=True) if not constant]
        program = parse(self.ptx)
        bits = [_bits(value, kind) for value, kind in zip(arguments, self._types, strict=True)]
        # Triton adds pointers to memory of its own, of which these kernels ask for none.
        bits += [0] * (len(program.parameters) - len(bits))
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        machine.run(program, (columns, rows, layers), bits, tensors, self._shared, self.kind)
        launches[program.name] += 1


def _bits(value: Tensor | float | None, kind: str) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind in ("fp32", "f32"):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value or 0) % 2**64


class _Driver:
    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
