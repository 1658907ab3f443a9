"""Counts what a kernel asks of the pipes of a multiprocessor, for each line of its source.

    TRITON_INTERPRET=0 PYTHONPATH=tests/kernels python -m ptx_emulator.counting spatial_attention 1x15x27

builds the kernels of an op for one video in bfloat16, 16 heads of 72 and 120 tokens of text, with the configurations
measured on an H200, runs them forward and backward, and prints what one program of each needs, in all and by line:

    issue   instructions of warps; a multiprocessor issues four a clock
    shared  wavefronts of shared memory, one a clock: 32 banks of four bytes, accesses of eight bytes go by half and of
            sixteen by quarter warps, ldmatrix and stmatrix by eight rows of sixteen bytes. The factors of a wgmma are
            read at 128 bytes a clock, and a shuffle takes one
    lines   lines of 128 bytes in global memory that a warp touches at once, one a clock

The matrix units' clocks are counted at 4096 FLOP. All this is of the PTX: ptxas issues other instructions, and what
goes on at one time is not seen here.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout, TextLayout, configurations, dispatch

from .arithmetic import TYPES
from .driver import emulate
from .machine import Machine
from .program import Address, Instruction

HEADS, HEAD_SIZE, TEXT = 16, 72, 120
MEASURED_ON = "NVIDIA H200"
OPS = ("spatial_attention", "temporal_attention", "cross_attention", "gelu_tanh")
MATRIX_FLOP = 4096  # a clock and multiprocessor, half precision
COLUMNS = ("issue", "shared", "lines")

# Kernel → how many programs ran; (kernel, source of an instruction) → what was counted → sum over these programs.
programs: Counter[str] = Counter()
counts: defaultdict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)


class CountingMachine(Machine):
    def run(self) -> None:
        programs[self.program.name] += self.threads // self.program.threads
        super().run()

    def _execute(self, instruction: Instruction, active: np.ndarray) -> None:
        warps = int(active.reshape(-1, 32).any(axis=1).sum())
        found = counts[self.program.name, instruction.source]
        found["issue"] += warps
        found.update(self._count(instruction, active, warps))
        super()._execute(instruction, active)

    def _count(self, instruction: Instruction, active: np.ndarray, warps: int) -> dict[str, float]:
        name, operands = instruction.name, instruction.operands
        first = name[0]
        if first in ("ld", "st") and "param" not in name:
            values, place = operands if first == "ld" else operands[::-1]
            size = TYPES[name[-1]].itemsize * (len(values) if isinstance(values, tuple) else 1)
            if "global" in name:
                return {"lines": self._count_lines(place, active)}
            return {"shared": count_shared(self._addresses(place, active), size)}
        if first == "cp" and len(operands) > 1:
            to, source, size = operands[:3]
            read = active & (self._read(operands[3]) > 0) if len(operands) > 3 else active  # the others copy zeros
            return {
                "shared": count_shared(self._addresses(to, active), size),
                "lines": self._count_lines(source, read),
            }
        if first in ("ldmatrix", "stmatrix"):
            registers, place = operands if first == "ldmatrix" else operands[::-1]
            rows = self._addresses(place, active).reshape(-1, 4, 8)[:, : len(registers)]
            return {"shared": count_shared(rows.reshape(-1, 8), 16)}
        if first == "shfl":
            return {"shared": warps}
        if first == "bar":
            return {"barriers": warps}
        if first == "mma":
            return {"matrix": warps * 2 * 16 * 8 * 16 / MATRIX_FLOP}
        if first == "wgmma" and len(operands) > 1:
            result, factor = operands[:2]
            columns, groups = 2 * len(result), warps / 4
            rows = 0 if isinstance(factor, tuple) else 64
            return {
                "shared": groups * (rows + columns) * 16 * 2 / 128,
                "matrix": groups * 2 * 64 * columns * 16 / MATRIX_FLOP,
            }
        return {}

    def _addresses(self, place: Address, active: np.ndarray) -> np.ndarray:
        """[warps, 32], -1 where a lane takes no part."""
        return np.where(active, self._address(place).astype(np.int64), -1).reshape(-1, 32)

    def _count_lines(self, place: Address, active: np.ndarray) -> int:
        """No access crosses the end of a line."""
        lines = np.full(self.threads, -1)
        lines[active] = self.memory.offset(self._address(place)[active]) // 128
        return sum(len(np.unique(lanes[lanes >= 0])) for lanes in lines.reshape(-1, 32))


def count_shared(addresses: np.ndarray, size: int) -> int:
    """Wavefronts of accesses of `size` bytes each to shared memory at addresses [n, lanes], -1 where there is none."""
    at_once = min(32 // max(1, size // 4), addresses.shape[1])
    total = 0
    for lanes in addresses.reshape(-1, at_once):
        words = np.unique((lanes[lanes >= 0][:, None] + np.arange(0, size, 4)) // 4)
        total += int(np.bincount(words % 32).max()) if len(words) else 0
    return total


def run(op: str, size: tuple[int, int, int]) -> None:
    """Forward and backward of an op on one video of (frames, rows, columns) tokens."""
    frames, rows, columns = size
    tokens = frames * rows * columns
    layout = PackLayout.of([size], "cpu")

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16).requires_grad_()

    qkv = draw(tokens, 3, HEADS, HEAD_SIZE)
    weights = [torch.ones(HEAD_SIZE, requires_grad=True) for _ in range(2)]
    if op == "spatial_attention":
        output = kernels.spatial_attention(qkv, *weights, layout, backend="triton")
    elif op == "temporal_attention":
        angles = torch.rand(frames, HEAD_SIZE // 2)
        bias = torch.zeros(3, HEADS, HEAD_SIZE, requires_grad=True)
        output = kernels.temporal_attention(
            qkv, *weights, angles.cos(), angles.sin(), layout, qkv_bias=bias, backend="triton"
        )
    elif op == "cross_attention":
        text = TextLayout.from_lengths([TEXT], "cpu")
        bias = torch.zeros(HEADS, HEAD_SIZE, requires_grad=True)
        output = kernels.cross_attention(
            qkv[:, 0], draw(TEXT, 2, HEADS, HEAD_SIZE), layout, text, q_bias=bias, backend="triton"
        )
    else:
        output = kernels.gelu_tanh(draw(tokens, 4 * HEADS * HEAD_SIZE), backend="triton")
    output.backward(torch.randn_like(output))


def describe(kernel: str, most: int) -> str:
    """A table of what one program of a kernel needs, and of its `most` expensive lines."""
    lines: defaultdict[str, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for (name, source), found in counts.items():
        if name == kernel:
            # A line of the kernel itself, and that of a loop which it calls.
            loops = [place for place in source if place.startswith("loops.py")]
            lines[" < ".join([*loops[-1:], *source[-1:]])].update(found)
            total.update(found)
    ran = programs[kernel]

    def row(found: Counter[str], place: str) -> str:
        return "".join(f"{found[name] / ran:9.0f}" for name in COLUMNS) + f"  {place}"

    expensive = sorted(lines.items(), key=lambda item: item[1]["issue"] / 4 + item[1]["shared"] + item[1]["lines"])
    return "\n".join(
        [
            f"{kernel}: one of {ran} programs; barriers of warps {total['barriers'] / ran:.0f}, "
            f"clocks of matrix units {total['matrix'] / ran:.0f}",
            "".join(f"{name:>9}" for name in COLUMNS),
            row(total, "all"),
            *(row(found, place) for place, found in expensive[: -most - 1 : -1]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what the kernels of an op ask of a multiprocessor's pipes.")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("size", metavar="TxRxC", help="frames, rows and columns of the video, in tokens")
    parser.add_argument("--lines", type=int, default=20, help="how many lines of each kernel to show")
    given = parser.parse_args()
    words = given.size.split("x")
    if len(words) != 3 or not all(word.isdecimal() and int(word) for word in words):
        parser.error(f"{given.size}: give three numbers, such as 16x9x16")
    if dispatch.interpreting():
        parser.error("set TRITON_INTERPRET=0: what Triton interprets is not built")
    size = tuple(int(word) for word in words)
    with ExitStack() as stack:
        stack.enter_context(emulate(CountingMachine))
        stack.enter_context(patch.object(dispatch, "interpreting", lambda: True))
        for (kernel, shape_class), choices in configurations.read_measured(MEASURED_ON).items():
            stack.enter_context(configurations.force(kernel, shape_class, configurations.Configuration(**choices)))
        run(given.op, size)
    print("\n\n".join(describe(kernel, given.lines) for kernel in programs))


if __name__ == "__main__":
    main()
