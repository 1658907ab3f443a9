"""Instructions of a warp, or of four, on matrices: where their elements are in registers and in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .arithmetic import from_bfloat16

_LANE = np.arange(32)
# The first row and column of what a lane holds of a tile: of 16 × 16 halves in four registers of two, of 16 rows of
# float32 in registers of one, 4 · j to 4 · j + 3 for the columns 8 · j to 8 · j + 7.
_ROW, _COLUMN = _LANE // 4, _LANE % 4 * 2


def halves(registers: np.ndarray) -> np.ndarray:
    """uint32 [...] → uint16 [..., 2], the lower half first."""
    return np.stack([registers & np.uint32(0xFFFF), registers >> np.uint32(16)], axis=-1).astype(np.uint16)


def joined(pairs: np.ndarray) -> np.ndarray:
    """uint16 [..., 2] → uint32 [...]."""
    return pairs[..., 0].astype(np.uint32) | pairs[..., 1].astype(np.uint32) << np.uint32(16)


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 → float32."""
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def lanes_of_8x8(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    """uint16 [warps, 8, 8] → what `ldmatrix` gives each lane, uint32 [warps, 32]."""
    matrix = matrix.swapaxes(1, 2) if transposed else matrix
    return joined(np.ascontiguousarray(matrix).reshape(len(matrix), 32, 2))


def matrix_of_lanes(registers: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse of `lanes_of_8x8`, as `stmatrix` writes it."""
    matrix = halves(registers).reshape(len(registers), 8, 8)
    return np.ascontiguousarray(matrix.swapaxes(1, 2)) if transposed else matrix


def first_factor(registers: Sequence[np.ndarray]) -> np.ndarray:
    """Four registers uint32 [warps, 32] → uint16 [warps, 16, 16]."""
    matrix = np.empty((len(registers[0]), 16, 16), dtype=np.uint16)
    for index, register in enumerate(registers):
        row, column = _ROW + index % 2 * 8, _COLUMN + index // 2 * 8
        pair = halves(register)
        matrix[:, row, column], matrix[:, row, column + 1] = pair[..., 0], pair[..., 1]
    return matrix


def second_factor(registers: Sequence[np.ndarray]) -> np.ndarray:
    """Two registers uint32 [warps, 32] of `mma` → uint16 [warps, 16, 8]."""
    matrix = np.empty((len(registers[0]), 16, 8), dtype=np.uint16)
    for index, register in enumerate(registers):
        pair = halves(register)
        matrix[:, _COLUMN + index * 8, _ROW], matrix[:, _COLUMN + index * 8 + 1, _ROW] = pair[..., 0], pair[..., 1]
    return matrix


def sums_from_registers(registers: Sequence[np.ndarray]) -> np.ndarray:
    """n / 2 registers uint32 [warps, 32] → float32 [warps, 16, n]."""
    sums = np.empty((len(registers[0]), 16, 2 * len(registers)), dtype=np.float32)
    for index, register in enumerate(registers):
        sums[:, _ROW + index % 4 // 2 * 8, _COLUMN + index // 4 * 8 + index % 2] = register.view(np.float32)
    return sums


def sums_to_registers(sums: np.ndarray) -> list[np.ndarray]:
    """The inverse of `sums_from_registers`."""
    return [
        sums[:, _ROW + index % 4 // 2 * 8, _COLUMN + index // 4 * 8 + index % 2].view(np.uint32)
        for index in range(sums.shape[2] // 2)
    ]


def described_addresses(descriptors: np.ndarray, size: int, along_rows: bool) -> np.ndarray:
    """Addresses in shared memory of the elements of a matrix that `wgmma` finds by a descriptor.

    Args:
        descriptors: uint64 [n].
        size: rows of the first factor, or columns of the second.
        along_rows: whether these, and not the 16 that are summed over, lie side by side in memory ("MN-major").

    Returns:
        int64 [n, size, 16].
    """
    found = np.empty((len(descriptors), size, 16), dtype=np.int64)
    for descriptor in np.unique(descriptors):
        found[descriptors == descriptor] = _addresses(int(descriptor), size, along_rows)
    return found


@lru_cache(maxsize=4096)
def _addresses(descriptor: int, size: int, along_rows: bool) -> np.ndarray:
    start, leading, stride = ((descriptor >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))
    # Bytes in which a row of eight is kept, whose groups of sixteen are exchanged.
    width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    outer, inner = np.arange(size)[:, None], np.arange(16)[None, :]
    if along_rows:
        elements = width // 2
        groups = outer // elements * leading + inner // 8 * stride
        address = start + groups + inner % 8 * width + outer % elements * 2
    elif width == 16:
        address = start + outer // 8 * stride + inner // 8 * leading + outer % 8 * 16 + inner % 8 * 2
    else:
        address = start + outer // 8 * stride + outer % 8 * width + inner * 2
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4
