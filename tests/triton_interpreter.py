"""Triton's interpreter for tests: it refuses what would be a wild access on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor


@contextmanager
def refuse_access_outside_arguments() -> Iterator[None]:
    """A load or store that touches a byte outside the tensors a kernel was launched with raises IndexError.

    The interpreter itself reads and writes whatever address it is given: other tensors, or the heap.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    originals = {name: getattr(builder, name) for name in names}
    original_launch = interpreter.GridExecutor.__call__
    launches: list[tuple[str, np.ndarray]] = []  # of kernels that run now: name, and spans of addresses

    def launch(executor, *arguments, **keywords):
        launches.append((executor.fn.__name__, _spans([*arguments, *keywords.values()])))
        try:
            return original_launch(executor, *arguments, **keywords)
        finally:
            launches.pop()

    def check(pointers, mask) -> None:
        kernel, spans = launches[-1]
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        addresses = addresses.astype(np.int64).ravel()
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        place = np.searchsorted(spans[:, 0], addresses, side="right") - 1
        inside = (place >= 0) & (addresses + size <= spans[place, 1])
        if not inside.all():
            raise IndexError(f"{kernel}: {(~inside).sum()} of {inside.size} addresses are outside its arguments")

    def load(self, pointers, mask, *others):
        check(pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *others)

    def store(self, pointers, value, mask, *others):
        check(pointers, mask)
        # It stores the bytes of the numpy array, whatever the pointer's type.
        width = pointers.get_element_ty().primitive_bitwidth // 8
        if value.data.itemsize != max(width, 1):
            raise TypeError(f"{launches[-1][0]}: stores {value.data.dtype} where elements have {width} bytes")
        return originals["create_masked_store"](self, pointers, value, mask, *others)

    def change(self, operation, pointers, value, mask, *others):
        check(pointers, mask)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *others)

    def compare_and_swap(self, pointers, *others):
        check(pointers, None)
        return originals["create_atomic_cas"](self, pointers, *others)

    for name, checked in zip(names, (load, store, change, compare_and_swap), strict=True):
        setattr(builder, name, checked)
    interpreter.GridExecutor.__call__ = launch
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = original_launch
        for name, original in originals.items():
            setattr(builder, name, original)


def _spans(arguments: list[object]) -> np.ndarray:
    """[tensors, 2] first address and end of each tensor's elements, ascending; views that overlap are one span."""
    spans: list[list[int]] = []
    tensors = [argument for argument in arguments if isinstance(argument, Tensor) and argument.numel()]
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        if spans and begin < spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([begin, end])
    return np.array(spans or [[0, 0]], dtype=np.int64)
