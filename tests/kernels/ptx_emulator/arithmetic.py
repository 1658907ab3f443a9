"""What an instruction computes in each thread, from operands that are given as bits in unsigned integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

TYPES = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f32": np.dtype("f4"),
    "f16": np.dtype("f2"),
    "pred": np.dtype("?"),
}


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest, of two the even one, as bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def typed(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits of a register or a number as values of a PTX type."""
    if kind == "bf16":
        return from_bfloat16(np.asarray(bits).astype(np.uint16))
    dtype = TYPES[kind]
    if dtype.kind == "b":
        return np.asarray(bits).astype(bool)
    return np.asarray(bits).astype(f"u{dtype.itemsize}").view(dtype)


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return to_bfloat16(values)
    dtype = TYPES[kind]
    values = np.asarray(values)
    return values.astype(dtype) if dtype.kind == "b" else values.astype(dtype).view(f"u{dtype.itemsize}")


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # The product of two float32 is exact in float64.
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _shift_left(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.where(by < 8 * x.dtype.itemsize, x << np.minimum(by, 8 * x.dtype.itemsize - 1).astype(x.dtype), 0)


def _shift_right(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    last = 8 * x.dtype.itemsize - 1
    shifted = x >> np.minimum(by, last).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by <= last, shifted, 0)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of integers of up to 32 bits, towards zero."""
    x, y = x.astype(np.int64), np.where(y == 0, 1, y).astype(np.int64)
    return np.where((x < 0) != (y < 0), -(np.abs(x) // np.abs(y)), np.abs(x) // np.abs(y))


def _maximum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmax(x, y) if x.dtype.kind == "f" else np.maximum(x, y)


def _minimum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmin(x, y) if x.dtype.kind == "f" else np.minimum(x, y)


# By the instruction's first word; all operands and the result are of the type in its last word.
_SIMPLE: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda x: x,
    "add": np.add,
    "sub": np.subtract,
    "min": _minimum,
    "max": _maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "fma": _fma,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "rem": lambda x, y: x - _divide(x, y) * y,
}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda x, y: (x != y) & (x == x) & (y == y),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compute(name: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """Bits of the result.

    Raises:
        KeyError: an instruction or a type that is not known.
    """
    first, kind = name[0], name[-1]
    if first == "selp":
        return to_bits(np.where(operands[2].astype(bool), *(typed(value, kind) for value in operands[:2])), kind)
    if first in ("shl", "shr"):
        value = typed(operands[0], "u" + kind[1:] if first == "shl" else kind)
        shifted = (_shift_left if first == "shl" else _shift_right)(value, typed(operands[1], "u32"))
        return to_bits(shifted, kind)
    if first == "setp":
        return _compare(name[1], *(typed(operand, kind) for operand in operands))
    if first == "cvt":
        return _convert(name, operands)
    if first in ("mul", "mad") and kind not in ("f32", "f16", "bf16"):
        return _multiply(name, operands)
    if first == "bfe":
        return _extract_bits(kind, *operands)
    if first == "prmt":
        return _permute_bytes(*(typed(operand, "u32") for operand in operands))
    values = [typed(operand, kind) for operand in operands]
    if first == "mul":
        result = values[0] * values[1]
    elif first == "div":
        result = values[0] / values[1] if kind == "f32" else _divide(*values)
    elif first == "max" and "NaN" in name:
        result = np.maximum(*values)
    else:
        result = _SIMPLE[first](*values)
    if "ftz" in name:
        result = np.where(np.abs(result) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), result), result)
    return to_bits(result, kind)


def _compare(comparison: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if comparison in _COMPARE:
        return _COMPARE[comparison](x, y)
    return _COMPARE[comparison.removesuffix("u")](x, y) | np.isnan(x) | np.isnan(y)  # "ltu": or not a number


def _convert(name: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    to, source = name[-2:]
    if to in ("bf16x2", "f16x2"):  # the first operand becomes the upper half
        high, low = (to_bits(typed(operand, "f32"), to[:-2]).astype(np.uint32) for operand in operands)
        return high << np.uint32(16) | low
    value = typed(operands[0], source)
    if value.dtype.kind == "f" and TYPES.get(to, np.dtype("f4")).kind in "iu":
        modes = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
        value = modes[next(word for word in name if word in modes)](value)
    return to_bits(value, to)


def _multiply(name: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """mul and mad, .lo, .hi and .wide, of integers."""
    half, kind = name[1], name[-1]
    x, y = (typed(operand, kind) for operand in operands[:2])
    if half == "lo":
        product = x * y
        return to_bits(product + typed(operands[2], kind) if name[0] == "mad" else product, kind)
    if kind[1:] != "32":
        raise KeyError(" ".join(name))
    wide = kind[0] + "64"
    product = x.astype(TYPES[wide]) * y.astype(TYPES[wide])
    if half == "hi":
        return to_bits(product >> TYPES[wide].type(32), kind)
    return to_bits(product + typed(operands[2], wide) if name[0] == "mad" else product, wide)


def _extract_bits(kind: str, bits: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    start, length = (typed(operand, "u32") & np.uint32(0xFF) for operand in (start, length))
    if ((start + length > 32) | (length == 0)).any():
        raise KeyError("bfe beyond 32 bits")
    left = np.uint32(32) - length
    moved = typed(bits, "u32") << (left - start)
    return to_bits(moved.view(TYPES[kind]) >> left.astype(TYPES[kind]), kind)


def _permute_bytes(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), dtype=np.uint64)
    for index in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * index)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        signs = np.where(byte >= 128, np.uint64(0xFF), np.uint64(0))
        result |= np.where(choice >= 8, signs, byte) << np.uint64(8 * index)
    return result.astype(np.uint32)
