"""What a call really keeps in memory, on any device: tensors saved for backward, and all that is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast.kernels.registration import KernelOp


class SavedBytes:
    """Bytes of the storages that autograd saves within the block; each once, without parameters and buffers."""

    def __init__(self, model: torch.nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage  # held, so that its address is not used again
            self.bytes += storage.nbytes()
        return tensor


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made within the block that are alive, and the most there ever were.

    Kernels are called around the dispatcher, as eager calls are, so that what an op allocates inside is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Callable, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self._add(item.untyped_storage())
        return result

    def ignore(self, model: torch.nn.Module) -> None:
        """Leaves out the parameters and buffers of a model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._alive[tensor.untyped_storage()._cdata] = 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.bytes -= self._alive.pop(address)

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self, patch.object(KernelOp, "__call__", lambda op, *arguments: op._direct(*arguments)):
            yield
