"""The mean of all processes' gradients, a segment at a time, while backward goes on; and the norm of a segment.

The trainable parameters, in the order in which backward finishes their gradients, are cut into segments. As soon as all
gradients of a segment are there, and of those before it, they are gathered into a flat tensor and averaged over the
processes, which begin the segments in one order: that of their names and shapes. Nothing depends on timing, so the
order of every sum is that of each other step, resumed or not, replayed as a CUDA graph (which calls no hooks) or not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from opensora_fast.parallel.processes import Processes
from opensora_fast.train.optimizer.flat import FlatLayout

# Elements of a segment, if its parameters are not larger: 32 MB of bfloat16.
SEGMENT = 1 << 24
# Elements whose squares a CPU adds up at a time.
NORM_PART = 1 << 16


def order_of_backward(names: Iterable[str]) -> list[str]:
    """Parameters of a model, named in the order of its layers, in the order in which backward finishes their gradients.

    The last layer comes first. Of ST-DiT-2 what serves all blocks comes last: the embedders, and the tables of the
    blocks, to which the modulation is added for all blocks at once.
    """

    def serves_all_blocks(name: str) -> bool:
        part = name.split(".")[0]
        return part not in ("final_layer", "blocks") or (part == "blocks" and "scale_shift_table" in name)

    return sorted(reversed(list(names)), key=serves_all_blocks)


def cut_segments(shapes: Mapping[str, torch.Size], shards: int) -> list[FlatLayout]:
    """The segments of several processes, in the order of backward, each to be cut into so many shards."""
    segments: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name in order_of_backward(shapes):
        size += shapes[name].numel()
        if segments[-1] and size > SEGMENT:
            segments.append({})
            size = shapes[name].numel()
        segments[-1][name] = shapes[name]
    return [FlatLayout(segment, shards) for segment in segments]


class MeanGradient:
    """Gathers the gradients of parameters, and averages them over the processes.

    Args:
        parameters: by name, each in one of the segments. Of several processes they get hooks.
        segments: where they lie, in the order in which they are averaged.
        dtype, device: of the gathered gradients.
        processes: each of which gives its gradients and gets its shard of every segment.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        segments: Sequence[FlatLayout],
        dtype: torch.dtype,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._parameters = parameters
        self._segments = segments
        self._dtype = dtype
        self._device = device
        self._processes = processes
        self._clear()
        if processes.world_size > 1:
            for number, layout in enumerate(segments):
                for name in layout.shapes:
                    parameters[name].register_post_accumulate_grad_hook(partial(self._arrive, number, name))

    def _clear(self) -> None:
        self._arrived: set[str] = set()
        self._missing = [len(layout.shapes) for layout in self._segments]
        self._begun = 0  # segments
        self._averaging: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def _arrive(self, number: int, name: str, _: Tensor) -> None:
        if name in self._arrived:
            raise _second_backward(name)
        self._arrived.add(name)
        self._missing[number] -= 1
        while self._begun < len(self._segments) and not self._missing[self._begun]:
            self._begin_segment()

    def _begin_segment(self) -> None:
        layout = self._segments[self._begun]
        gradients = {name: self._parameters[name].grad for name in layout.shapes}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"no gradient of {missing[0]}{more}: call backward before step")
        flat = layout.gather(gradients, self._dtype, self._device)
        del gradients
        for name in layout.shapes:
            self._parameters[name].grad = None
        self._begun += 1
        # Kept until it has been averaged: another stream reads it.
        self._averaging.append((flat, self._processes.average(flat)))

    def begin(self) -> None:
        """Begin to average what backward has not: everything where no hook was called.

        Raises:
            ValueError: a parameter has no gradient, or a second one before `finish`.
        """
        if self._begun == len(self._segments):
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    raise _second_backward(name)
        while self._begun < len(self._segments):
            self._begin_segment()

    def finish(self) -> Iterator[Tensor]:
        """This process's shard of each segment, one after another as they come in: as gathered if it is alone,
        otherwise the mean in float32. The parameters have no gradients afterwards."""
        self.begin()
        while self._averaging:
            _, wait = self._averaging.pop(0)
            yield wait()
        self._clear()


def measure_norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm, float32 [], of a flat tensor.

    A CPU takes it of parts: PyTorch there adds the squares of a whole vector to a few sums in float32, which come out
    0.4 % too small for 50 M elements (a GPU adds them up as a tree).
    """
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    parts = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradient.split(NORM_PART)]
    return torch.linalg.vector_norm(torch.stack(parts))


def _second_backward(name: str) -> ValueError:
    return ValueError(f"a second gradient of {name} before a step: call step after every backward")
