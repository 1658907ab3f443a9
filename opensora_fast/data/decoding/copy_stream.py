"""Copies of clips to a GPU that do not wait for what training has queued there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class CopyStream:
    """A stream of a GPU on which a decoder's threads copy. They wait for their copies: on the stream that trains they
    would wait for all that it has still to do, which is up to a step.

    Args:
        device_id: number of the GPU.
    """

    def __init__(self, device_id: int) -> None:
        self._device = torch.device("cuda", device_id)
        self._stream = torch.cuda.Stream(self._device)

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """What is computed or copied in the block is done when it ends."""
        # The device first: a new thread has GPU 0 as its current one, and leaving a stream of another would set it
        # again, which takes memory there in every process.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def place(self, clip: torch.Tensor) -> torch.Tensor:
        """A clip on the GPU, made in `finished` or on the host, for the calling thread's stream."""
        with self.finished():
            placed = clip.to(self._device)
        # Its memory belongs to the stream of copies: not to be used again there before this thread's has read it.
        placed.record_stream(torch.cuda.current_stream(self._device))
        return placed
