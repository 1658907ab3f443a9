"""Losses and gradients of a training step by replaying CUDA graphs, where the host takes longer than the GPU.

The host needs about as long for the launches of a small step as for those of a large one. A graph holds all of them:
those of forward and loss, and a second one those of backward, so that the host can read the loss while backward runs.

What lives how long:

- a graph, with the tensors that its inputs are copied to, and the tables that its kernels read: as long as its shapes
  are among those that come most often (see `most_used.py`);
- the memory that forward and backward work in: one pool for all graphs, as large as the largest needs. A replay
  writes all that it reads there, and the next one, of any graph, may write over it;
- the losses that come out: in that pool, so until the next replay;
- the gradients: one set for all graphs, outside the pool, until the next capture or backward of a replay.

`torch.cuda.max_memory_allocated` counts what lies in the pool only while a graph is captured. What CUDA's driver keeps
of each graph, with a node for every launch, is counted neither there nor by `costs.memory`: CUDA promises no size.

The optimizer, collectives and all draws of random numbers stay outside. Whether a step is replayed does not change its
numbers: the first steps of a shape, which are not, launch the same on the same inputs. So a resumed run, which captures
its graphs anew, takes the same steps.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opensora_fast.cuda_graphs import (
    CudaRecorder,
    Graph,
    Recorder,
    Recording,
    Tensors,
    capture,
    copy_to_device,
    refuse_without_gpu,
)
from opensora_fast.kernels import PackLayout
from opensora_fast.model import STDiT2
from opensora_fast.train.step.losses import LATENTS
from opensora_fast.train.step.most_used import MostUsed

# A capture costs a step and about 0.3 s (H200), so a shape that comes once is not worth one, and a graph is not worth
# throwing away for a shape that is used but a little more: some 8 replays of 13 k tokens spare what a capture costs.
OCCURRENCES = 2
MARGIN = 8
MOST_SHAPES = 64
# Worth trying where nothing is configured: up to so many tokens the host takes about as long as an H200, or longer.
SUGGESTED_TOKENS = 16384

Losses = Tensors
Key = tuple[tuple[str, torch.dtype, torch.Size], ...]


class StepGraphs:
    """Computes losses and gradients of steps, small ones by replaying graphs.

    Args:
        model: whose trainable parameters get gradients. They and all others must stay where they
            are from the first capture on.
        compute: compute(inputs) → losses, of which `loss` [] has the gradients. It must launch the same for the same
            shapes, draw nothing, and not wait for the GPU when all inputs are there.
        tokens: steps of at most so many video tokens are replayed; those of more, whose kernels take longer than their
            launches, are computed as they come.
        occurrences: the step of a shape at which its graph is captured; those before are computed without.
        most: shapes that have a graph at a time, those that come most often.
        margin: how many more steps a shape must have had than one that has a graph, to get one in its place.
        record: what records a step; by default `CudaRecorder()`.

    Attributes:
        steps, captured, replayed: how many steps were computed in all, graphs captured, and steps replayed.

    Raises:
        ValueError: the model is not on a GPU and `record` is not given, or `occurrences`, `most` or `margin` is not
            positive.
        RuntimeError (of steps): a parameter or buffer has moved in memory since the first capture.
        CaptureError (of steps): memory has run out in a capture, for example.
    """

    def __init__(
        self,
        model: STDiT2,
        compute: Callable[[dict[str, Tensor]], Losses],
        tokens: int,
        *,
        occurrences: int = OCCURRENCES,
        most: int = MOST_SHAPES,
        margin: int = MARGIN,
        record: Recorder | None = None,
    ) -> None:
        if record is None:
            refuse_without_gpu(tokens, model.device.type)
        self.model = model
        self.compute = compute
        self.tokens = tokens
        self.steps = self.captured = self.replayed = 0
        self._record = record or CudaRecorder()
        self._graphs: MostUsed[Key, Graph] = MostUsed(most, occurrences, margin)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor] | None = None
        self._read = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._places: list[int] | None = None
        self._running: Recording | None = None

    def compute_losses(self, inputs: Mapping[str, Tensor]) -> Losses:
        """The losses of a step; `backward` of them is to follow.

        Args:
            inputs: tensors of any device, among them the latents [B, channels, T, h, w] of the model's device.

        Returns:
            What `compute` returns. Of a replayed step the next one writes over it, so it is to be read, or a read
            queued, before. Of others it must be dropped before, with its history.
        """
        self.steps += 1
        self._running = None
        layout = self.model.get_layout([inputs[LATENTS]])
        if layout.num_tokens > self.tokens:
            return self.compute(dict(inputs))
        key = tuple(sorted((name, value.dtype, value.shape) for name, value in inputs.items()))
        graph = self._graphs.use(key)
        if graph is not None:
            copy_to_device(inputs, self.model.device, graph.inputs)
        elif self._graphs.make_room(key):
            graph = self._capture(inputs, layout)
            self._graphs.keep(key, graph)
        else:
            return self.compute(copy_to_device(inputs, self.model.device))
        self._refuse_moved()
        graph.recording.replay_forward()
        self.replayed += 1
        self._running = graph.recording
        return dict(graph.recording.outputs)

    def backward(self, losses: Losses) -> None:
        """Gives every trainable parameter its gradient, in place of any that it has, of the losses computed last."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._running is None:
            losses["loss"].backward()
            return
        self._running.replay_backward()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def describe(self) -> str:
        """What was replayed, in one line."""
        return f"CUDA graphs: {self.captured} captured, {self.replayed} of {self.steps} steps replayed"

    def _capture(self, inputs: Mapping[str, Tensor], layout: PackLayout) -> Graph:
        if self._gradients is None:
            self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
            self._places = self._find_places()

        def backward(losses: Losses) -> None:
            found = torch.autograd.grad(losses["loss"], self._parameters)
            torch._foreach_copy_(self._gradients, found)

        graph = capture(self._record, inputs, self.model.device, layout, self.compute, backward)
        self.captured += 1
        return graph

    def _find_places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._read.values()]

    def _refuse_moved(self) -> None:
        """RuntimeError if a weight lies elsewhere than at the first capture: graphs would go on to read it there."""
        places = self._find_places()
        if places != self._places:
            moved = next(name for name, old, new in zip(self._read, self._places, places, strict=True) if old != new)
            raise RuntimeError(
                f"{moved} has moved in memory since the first CUDA graph was captured, and graphs would read what was "
                "there before: change its values in place, or make StepGraphs anew"
            )
