"""Calls recorded as CUDA graphs: their samples hold the work of the kernels, not the host's for launching them.

The queue of a training step hides the host. A single call has none, so that an op whose kernels take less time than its
launches would be timed with the GPU waiting for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from opensora_fast.kernels.attention.tables import keep_tables

from .accuracy import distance, norm
from .timing import Call


@dataclass(frozen=True)
class RecordedCall:
    """A call that can be replayed.

    Attributes:
        replay: computes again what was recorded, from what its inputs hold by then.
        outputs: of the recorded call; a replay writes new values there.
    """

    replay: Call
    outputs: object


# How far what a replay computes may lie from what the call did, relative to each of its results, so that sums in any
# order pass, and values of another call or of nothing do not. A result that is a smaller share of all of them may be
# zero but for rounding, which is another each time.
MOST_APART, SMALL_SHARE = 0.1, 1e-2

CallRecorder = Callable[[Call], RecordedCall]  # of a call that has worked before; raises where it cannot be recorded


def recorder_of(device: str) -> Callable[[], CallRecorder] | None:
    """What makes the recorder of ops and blocks; None on the CPU, where the host itself computes."""
    return CudaGraphs if device == "cuda" else None


def make_replay(call: Call, record: CallRecorder) -> Call:
    """A call that replays `call`, which has worked before.

    Raises:
        Exception: whatever `record` raises; ValueError where a replay does not write what the call returns, as the
            work was not done where the recorder looked, or writes other values.
    """
    called = _tensors(call())
    recording = record(call)
    # What lies where it lay before is no result of its own: an input that was handed on, or something cached.
    pairs = [
        (tensor, before)
        for tensor, before in zip(_tensors(recording.outputs), called, strict=True)
        if tensor.data_ptr() != before.data_ptr() and tensor.is_floating_point()
    ]
    del called
    for tensor, _ in pairs:  # bytes of ones are NaN in every floating-point type
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).fill_(255)
    recording.replay()
    if any(tensor.isnan().any() for tensor, _ in pairs):
        raise ValueError("a replay does not write all that the call returns")
    sizes = [norm(before) for _, before in pairs]
    for (tensor, before), size in zip(pairs, sizes, strict=True):
        if distance(tensor, before) > MOST_APART * max(size, SMALL_SHARE * math.hypot(*sizes)):
            raise ValueError("a replay computes something else than the call")

    def replay(inputs: object = call) -> None:  # what the call reads lies where it lay only as long as someone holds it
        recording.replay()

    return replay


def _tensors(outputs: object) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, Sequence) else (outputs,)
    return [output for output in outputs if isinstance(output, Tensor)]


# ---- CUDA ----


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """On CUDA, work within lies on one side stream; work on the default stream cannot be recorded.

    That includes the forward pass of a recorded backward pass, which autograd runs on the stream of its forward.
    """
    if device != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(), _side_stream()
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all, since libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


class CudaGraphs:
    """Records calls as CUDA graphs, within `own_stream`. They share one pool of memory, as large as the largest needs.

    A replay writes all that it reads there, so they can be replayed in any order; the outputs of one last until the
    next replay. The pool is free once the last replay is dropped.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> RecordedCall:
        _refuse_waiting(call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the allocator gives nothing back while it records
        graph = torch.cuda.CUDAGraph()
        try:
            with keep_tables() as tables:
                outputs = _capture(graph, self._pool, call)
        except Exception:
            self._pool = torch.cuda.graph_pool_handle()  # none may be taken up again that nothing uses any more
            raise

        def replay(kept: object = tables) -> None:
            graph.replay()

        return RecordedCall(replay, outputs)


def _refuse_waiting(call: Call) -> None:
    """RuntimeError for a call in which PyTorch waits for the GPU, without the broken capture that would follow."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


_broken: list[torch.cuda.CUDAGraph] = []


def _capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], call: Call) -> object:
    """The outputs of the call as captured; other threads may use the GPU meanwhile."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        outputs = call()
    except Exception:
        with suppress(RuntimeError):  # says only that the capture is broken; what the call raised says why
            _end_capture(graph, pool)
        raise
    _end_capture(graph, pool)
    return outputs


def _end_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Ends a capture; RuntimeError for one that is broken, after which eager work and other captures go on.

    PyTorch (2.11) leaves three things behind then: an allocator that believes in a capture and gives no memory back, a
    generator of random numbers that does so too until a capture ends well, and an error that the next launch reports.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        _broken.append(graph)  # the allocator asks it which streams it captures, even now
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        scratch, empty = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        scratch.add_(1)
        empty.capture_end()
        raise
