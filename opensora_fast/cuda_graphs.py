"""CUDA graphs of what a model computes: recorded once, then replayed without the host's work for launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from opensora_fast.kernels import PackLayout, calls
from opensora_fast.kernels.attention.tables import keep_tables

Tensors = dict[str, Tensor]
Result = TypeVar("Result")


class CaptureError(ValueError):
    """A CUDA graph could not be captured. The cause is what went wrong first."""


@dataclass(frozen=True)
class Recording:
    """A forward pass that can be replayed, and a backward pass behind it where one was recorded.

    Attributes:
        outputs: what forward returned, without its history; a replay of forward writes new values there.
        replay_forward: computes again what was recorded, from what its inputs hold by then.
        replay_backward: likewise, once behind each replay of forward.
    """

    outputs: Tensors
    replay_forward: Callable[[], None]
    replay_backward: Callable[[], None] | None = None


class Recorder(Protocol):
    """Records passes; the result of the recording itself is not used."""

    def __call__(
        self, forward: Callable[[], Tensors], backward: Callable[[Tensors], None] | None = None
    ) -> Recording: ...


class CudaRecorder:
    """Records into CUDA graphs, which share one memory pool. No outputs with a history may be there meanwhile.

    Raises:
        CaptureError (of calls): CUDA refuses the capture, or its memory has run out in it.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._latest: torch.cuda.CUDAGraph | None = None

    def __call__(self, forward: Callable[[], Tensors], backward: Callable[[Tensors], None] | None = None) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Once without: this builds kernels and copies tables, which cannot be captured.
        outputs = forward()
        if backward is not None:
            backward(outputs)
        del outputs
        # Autograd binds a parameter to the stream of its first use as long as any history of it is there. That of
        # another stream would be drawn into the capture, which fails then.
        gc.collect()
        # Kept even when its shape is forgotten: torch refuses to capture into a pool whose graphs are all gone.
        outputs, replay_forward, self._latest = self._capture(forward)
        replay_backward = None
        if backward is not None:
            _, replay_backward, _ = self._capture(lambda: backward(outputs))
        return Recording({name: output.detach() for name, output in outputs.items()}, replay_forward, replay_backward)

    def _capture(self, compute: Callable[[], Result]) -> tuple[Result, Callable[[], None], torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        calls_before = calls.copy()
        first: Exception | None = None
        try:
            # Threads that decode and load may go on meanwhile: what they ask of CUDA does not end the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    result = compute()
                except Exception as error:
                    first = error  # the end of a capture that has become invalid raises one that says only that
                    raise
        except RuntimeError as error:
            if self._latest is None:
                self._pool = None  # nothing else keeps it, and torch refuses it then
            raise CaptureError(
                f"a CUDA graph could not be captured: lower cuda_graph_tokens, or set it to 0. {first or error}"
            ) from (first or error)
        finally:
            del first  # it holds this frame, and with it what the capture has made
        captured = calls - calls_before
        calls.subtract(captured)  # nothing has run yet

        def replay() -> None:
            graph.replay()
            calls.update(captured)

        return result, replay, graph


@dataclass(frozen=True)
class Graph:
    """A recording that computes from inputs of its own.

    Attributes:
        recording: of it.
        inputs: what it reads; others of the same shapes are copied there before a replay.
        tables: that its kernels read, kept alive.
    """

    recording: Recording
    inputs: Tensors
    tables: object


def capture(
    record: Recorder,
    inputs: Mapping[str, Tensor],
    device: torch.device,
    layout: PackLayout,
    forward: Callable[[Tensors], Tensors],
    backward: Callable[[Tensors], None] | None = None,
) -> Graph:
    """Record what is computed from copies of the inputs, of a pack of this layout."""
    copies = copy_to_device(inputs, device)
    with keep_tables() as tables:
        recording = record(lambda: forward(dict(copies)), backward)
    return Graph(recording, copies, (layout, tables))


def copy_to_device(inputs: Mapping[str, Tensor], device: torch.device, copies: Tensors | None = None) -> Tensors:
    """Contiguous copies on the device, into those given or new ones: a graph reads nothing on the host, and the order
    of a sum may depend on strides."""
    if copies is None:
        copies = {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in inputs.items()}
    for name, value in inputs.items():
        copies[name].copy_(value, non_blocking=True)
    return copies


def refuse_without_gpu(tokens: int, device: str) -> None:
    """ValueError where what has up to so many tokens is to be replayed on a device that has no CUDA graphs."""
    if tokens and device != "cuda":
        raise ValueError(
            f"cuda_graph_tokens={tokens}: only a GPU replays CUDA graphs, and the device is {device}; set "
            "cuda_graph_tokens=0, or give --device cuda"
        )
