"""Memory: the tensors of a launch, and each block's shared memory with a check for races."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

# Where shared memory begins on sm_90: the system keeps the first KiB.
SHARED_BASE = 1024


class WrongAccess(Exception):
    """What would be wrong, or not sure to be right, on a GPU."""


class GlobalMemory:
    """The storages of a launch's tensors; nothing else may be touched."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        spans = sorted((start, size) for start, size in storages.items() if size)
        self._starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self._bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)) for start, size in spans]

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size] at addresses uint64 [n]."""
        found = np.empty((len(addresses), size), dtype=np.uint8)
        for memory, here, offsets in self._places(addresses, size):
            found[here] = memory[offsets]
        return found

    def offset(self, addresses: np.ndarray) -> np.ndarray:
        """Where in its storage each address is, int64 [n]: on a GPU storages begin where lines of memory do."""
        span = np.searchsorted(self._starts, addresses, side="right") - 1
        return (addresses - self._starts[span]).astype(np.int64)

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: bytes [n, size]."""
        for memory, here, offsets in self._places(addresses, values.shape[1]):
            memory[offsets] = values[here]

    def _places(self, addresses: np.ndarray, size: int):
        if len(addresses) and (addresses % np.uint64(size)).any():
            raise WrongAccess(f"an address is no multiple of the {size} bytes that are accessed")
        span = np.searchsorted(self._starts, addresses, side="right") - 1
        for index in np.unique(span):
            here = span == index
            offsets = (addresses[here] - self._starts[index]).astype(np.int64)
            if index < 0 or (offsets + size > len(self._bytes[index])).any():
                raise WrongAccess("an address is outside the tensors of the launch")
            yield self._bytes[index], here, offsets[:, None] + np.arange(size)


class SharedMemory:
    """Shared memory of blocks that run side by side.

    Between two barriers a warp may not read what another wrote, nor write something else where another read. What two
    warps write to one place in one instruction is taken for a copy of one number: layouts hold those of small tensors
    several times.
    """

    def __init__(self, blocks: int, size: int) -> None:
        size = -(-size // 16) * 16
        self.size = size
        self.bytes = np.full(blocks * size, 0xFF, dtype=np.uint8)
        # Of each two bytes: when and by which warp they were written, read (-1: by several), and whether a copy to them
        # is under way.
        self.written, self.read = (np.zeros(blocks * size // 2, dtype=np.int64) for _ in range(2))
        self.writer, self.reader = (np.zeros(blocks * size // 2, dtype=np.int16) for _ in range(2))
        self.coming = np.zeros(blocks * size // 2, dtype=bool)
        # Whether the asynchronous proxy, by which matrix units read, may not see them yet.
        self.unseen = np.zeros(blocks * size // 2, dtype=bool)
        self.now = 1
        self.barriers = np.zeros(blocks, dtype=np.int64)

    def load(self, blocks: np.ndarray, warps: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size] at addresses [n]; blocks and warps: whose, [n]."""
        places = self._places(blocks, addresses, size)
        self.note_read(blocks, warps, self._cells(places))
        return self.bytes[places]

    def store(
        self,
        blocks: np.ndarray,
        warps: np.ndarray,
        addresses: np.ndarray,
        values: np.ndarray,
        *,
        under_way: bool = False,
        fenced: bool = False,
    ) -> None:
        """values: bytes [n, size]. `under_way`: these are not what a copy is going to write. `fenced`: matrix units may
        read them."""
        places = self._places(blocks, addresses, values.shape[1])
        cells = self._cells(places)
        warps = np.broadcast_to(warps[:, None], cells.shape)
        since = self.barriers[blocks][:, None]
        changed = (self.bytes[places] != values).reshape(*cells.shape, -1).any(axis=2)
        if (changed & (self.written[cells] > since) & (self.writer[cells] != warps)).any():
            raise WrongAccess("a warp writes where another wrote since the last barrier")
        if (changed & (self.read[cells] > since) & (self.reader[cells] != warps)).any():
            raise WrongAccess("a warp writes where another read since the last barrier")
        self.written[cells], self.writer[cells] = self.now, warps
        self.coming[cells], self.unseen[cells] = under_way, not fenced
        self.bytes[places] = values

    def gather(self, blocks: np.ndarray, warps: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What matrix units read for warps [n] at addresses [n, m]: uint16 [n, m], and the cells, for `note_read`."""
        places = self._places(np.repeat(blocks, addresses.shape[1]), addresses.ravel(), 2)
        cells = self._cells(places).reshape(addresses.shape)
        if self.unseen[cells].any():
            raise WrongAccess("matrix units read what no fence has made visible to them")
        self.note_read(blocks, warps, cells)
        return self.bytes[places].view(np.uint16).reshape(addresses.shape), cells

    def note_read(self, blocks: np.ndarray, warps: np.ndarray, cells: np.ndarray, since: int | None = None) -> None:
        """cells: [n, m]. `since`: an instruction that reads them, and goes on reading until now."""
        warps = np.broadcast_to(warps[:, None], cells.shape)
        barriers = self.barriers[blocks][:, None]
        if self.coming[cells].any():
            raise WrongAccess("shared memory is read before the copy to it has been waited for")
        if since is not None and (self.written[cells] > since).any():
            raise WrongAccess("shared memory is written while a product reads it")
        if since is None and ((self.written[cells] > barriers) & (self.writer[cells] != warps)).any():
            raise WrongAccess("a warp reads what another wrote since the last barrier")
        others = (self.read[cells] > barriers) & (self.reader[cells] != warps)
        readers = np.where(others, -1, warps)
        self.read[cells], self.reader[cells] = self.now, readers
        several = self.reader[cells] != readers  # other warps, in this same instruction
        self.reader[cells[several]] = -1

    def fence(self, blocks: np.ndarray, warps: np.ndarray) -> None:
        """What these warps wrote is seen by matrix units from here on."""
        fenced = np.zeros((len(self.barriers), 64), dtype=bool)
        fenced[blocks, warps] = True
        cells = len(self.unseen) // len(self.barriers)
        self.unseen &= ~fenced[np.arange(len(self.unseen)) // cells, self.writer]

    def barrier(self, blocks: np.ndarray) -> None:
        self.barriers[blocks] = self.now

    def _cells(self, places: np.ndarray) -> np.ndarray:
        """Of bytes [n, size] the indices of what is known of each two."""
        return places[:, :: 2 if places.shape[1] > 1 else 1] // 2

    def _places(self, blocks: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if (offsets % size).any():
            raise WrongAccess(f"an address of shared memory is no multiple of the {size} bytes that are accessed")
        if ((offsets < 0) | (offsets + size > self.size)).any():
            raise WrongAccess("an address is outside the block's shared memory")
        return (blocks * self.size + offsets)[:, None] + np.arange(size)
