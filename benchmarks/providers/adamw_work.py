"""What an optimizer step works on: gradients and state of all parameters of a model, as flat tensors and as lists.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_fast.costs.operations import Count
from opensora_fast.model import STDiT2, STDiT2Config
from opensora_fast.train.optimizer.flat import FlatLayout

from ..measuring.accuracy import OUTPUT, Named
from ..measuring.provider import Bound

# Larger than in training, so that what a step changes is not small beside what is there: an error in the change alone
# would be lost in the size of the weights.
LEARNING_RATE, EMA_DECAY, WEIGHT_SIZE = 0.01, 0.9, 0.02
STEPS_BEFORE = 1000  # in the first steps 1 - β₂ᵗ has few digits where a library computes it in float32
MAX_NORM, GRADIENT_NORM = 1.0, 2.0
NORM_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_
# Of the state, whose names are those of the op's arguments.
STATE = ("master", "first_moment", "second_moment", "average")
UPDATE = "update"  # the direction of the rows


@dataclass(frozen=True)
class AdamWWork:
    """Gradients and state of the parameters of a model; every step changes the state.

    Attributes:
        layout: where each parameter lies in a flat tensor.
        flat: [P and padding] by name: gradient, those of `STATE`, and working, unless the weights are their own.
        drawn: the dtype that gradients and working weights are rounded to.
    """

    layout: FlatLayout
    flat: dict[str, Tensor]
    drawn: torch.dtype

    @property
    def device(self) -> str:
        return self.flat["master"].device.type

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, which the errors are judged by."""
        return self.flat["master"].dtype

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of the parameters, as parts of a flat one; {} for working weights that are their own masters."""
        return self.layout.views(self.flat[name]) if name in self.flat else {}

    def to(self, dtype: torch.dtype) -> AdamWWork:
        """The same values, all of them in another dtype."""
        return replace(self, flat={name: flat.to(dtype) for name, flat in self.flat.items()})

    def reset(self) -> None:
        """Gives gradients and state their first values: the same in every dtype."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = self.layout.size
        element = size**-0.5  # of a gradient of norm 1

        def draw() -> Tensor:
            return torch.randn(size, generator=generator, device=self.device, dtype=torch.float32)

        flat = self.flat
        flat["gradient"].copy_((GRADIENT_NORM * element * draw()).to(self.drawn))
        flat["master"].copy_(WEIGHT_SIZE * draw())
        flat["first_moment"].copy_(0.2 * element * draw())
        # Away from zero, where a quotient of moments has no size.
        flat["second_moment"].copy_(0.5 * element**2 * draw().square().add_(1.0))
        flat["average"].copy_(WEIGHT_SIZE * draw())
        if "working" in flat:
            flat["working"].copy_(flat["master"].to(self.drawn))


def parameter_shapes(config: STDiT2Config) -> dict[str, torch.Size]:
    """Of the trainable parameters of a model, by name."""
    with torch.device("meta"):
        model = STDiT2(config)
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_adamw_work(shapes: Mapping[str, torch.Size], device: str, dtype: torch.dtype) -> AdamWWork:
    """Random gradients in `dtype`, and state, of parameters of these shapes."""
    layout = FlatLayout(shapes)
    flat = {name: torch.empty(layout.size, device=device) for name in STATE}
    halves = ("gradient",) if dtype == torch.float32 else ("gradient", "working")
    flat |= {name: torch.empty(layout.size, device=device, dtype=dtype) for name in halves}
    work = AdamWWork(layout, flat, dtype)
    work.reset()
    return work


def count_adamw(parameters: int, element: int) -> Count:
    """Least bytes of a step, gradients of `element` bytes; the few operations on each element do not bound it.

    Each of the four float32 tensors is read and written, the working weights are written (where there are any), and
    gradients are read twice: for their norm, without which no weight can change, and for the step.
    """
    working = 0 if element == torch.float32.itemsize else element
    return Count(0.0, float(parameters * (2 * element + len(STATE) * 8 + working)))


def adamw_results(bound: Bound, work: AdamWWork) -> tuple[Named, float]:
    """The state after one step, and what it wrote into the working weights; a tensor for each parameter."""
    work.reset()
    bound()
    names = [name for name in (*STATE, "working") if name in work.flat]
    return {f"{OUTPUT} {name}": {key: z.clone() for key, z in work.tensors(name).items()} for name in names}, 0.0


def update_call(bound: Bound, work: AdamWWork) -> Bound:
    return bound
