"""AdamW on float32 weights, for a model that computes in float32 or bfloat16.

Open-Sora 1.1 trains with HybridAdam in AdamW mode, weight decay 0, beneath ZeRO in bf16: the model holds bf16 working
weights, the optimizer their float32 masters, gradients are brought to float32, clipped to a global norm and applied to
the masters, which are then rounded into the working weights. The same here.

Weights, moments and average each lie in one flat tensor, of which those by name are views: a step of 768 M parameters
in some 800 tensors is then a handful of launches (see `opensora_fast.kernels.adamw`).

For several processes the flat tensor is cut into segments (see `gradients.py`), and each process holds the masters,
moments and average of one shard of every segment (ZeRO stage 1): the gradients are averaged into shards while backward
goes on, each process updates its own, and the new working weights of a segment are spread while the next one is
updated. DDP would keep all of it on every device. It also changes its buckets after the first step, and with them the
order in which more than two processes' gradients are added: a resumed run would not be exact. Here the order depends on
the layout alone.
"""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from opensora_fast.kernels import adamw
from opensora_fast.parallel.collectives import do_all
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.flat import FlatLayout
from opensora_fast.train.optimizer.gradients import MeanGradient, cut_segments, measure_norm

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
# Where the state of an optimizer does not fit.
REMEDY = "train as before, or start a new run from the weights alone with --init-from"


class MasterAdamW:
    """AdamW over the trainable parameters of a model, which it moves to its working dtype and device.

    Args:
        model: in float32, on any device, with its initial weights. Moved in place to `device` and `dtype`; afterwards
            its trainable parameters are views of one tensor (of several processes: of one for each segment) and must
            stay where they are.
        dtype: working dtype, float32 or bfloat16. In float32 the parameters of one process are their own masters.
        device: where the model trains.
        lr: learning rate.
        grad_clip: largest global norm of the gradient; None or 0 does not clip.
        backend: of the step: "auto", "reference" or "triton"; "auto" is Triton on CUDA.
        processes: those that train the model together, each with the same initial weights; None is this one alone.
            What needs all of them (backward, `begin_step`, `step`, `masters`, `full_state`, `state_dict`) every one
            must call.

    Attributes:
        shapes: of the trainable parameters, by name.
        master: float32 weights that this process updates: its shards of all segments, or all weights if it is alone.
        fixed: float32 weights and buffers that are not trained, by name, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        lr: float,
        grad_clip: float | None,
        backend: str = "auto",
        processes: Processes | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: train in float32 or bfloat16")
        self.model = model
        self.lr = lr
        self.grad_clip = grad_clip or None
        self.backend = backend
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self._parameters:
            raise ValueError("the model has no trainable parameter: check model.freeze")
        self.fixed = {
            name: value.cpu().clone() for name, value in model.state_dict().items() if name not in self._parameters
        }
        self.processes = Processes(device) if processes is None else processes
        self.shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        alone = self.processes.world_size == 1
        self._segments = [FlatLayout(self.shapes)] if alone else cut_segments(self.shapes, self.processes.world_size)
        lengths = [layout.size // self.processes.world_size for layout in self._segments]
        ends = list(accumulate(lengths))
        self._shards = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._weights = [layout.gather(self._parameters, dtype, device) for layout in self._segments]
        working = [weights.view(self.processes.world_size, -1)[self.processes.rank] for weights in self._weights]
        if alone and dtype == torch.float32:
            self.master, self._working = working[0], [None]
        else:
            self.master, self._working = torch.zeros(ends[-1], device=device), working
            self.fill(self.master, self._parameters)
        for layout, weights in zip(self._segments, self._weights, strict=True):
            for name, view in layout.views(weights).items():
                self._parameters[name].data = view
        model.to(device, dtype)
        self._gradient = MeanGradient(self._parameters, self._segments, dtype, device, self.processes)
        self._moments = [torch.zeros_like(self.master) for _ in range(2)]
        self._step = torch.zeros((), device=device)
        # Weights drawn on processors of different kinds may differ in the last bit.
        for weights in self._weights:
            self.processes.spread(weights)()

    def begin_step(self) -> None:
        """Of several processes: begin to average what backward has not begun to. To be called after backward and before
        the processes meet elsewhere: after that one may stop, and none waits for what another has not begun.

        Raises:
            ValueError: a trainable parameter has no gradient, or a second one before `step`.
        """
        if self.processes.world_size > 1:
            self._gradient.begin()

    def step(self, ema: EMA | None = None) -> Tensor:
        """Average over the processes, clip, apply and clear the gradients of the model; let the EMA follow.

        Nothing changes if the gradient is not finite: weights, state and average stay as they are.

        Returns:
            The norm of the averaged gradient before clipping, float32 [] on the device; the caller reads it.

        Raises:
            ValueError: as `begin_step`.
        """
        gradients, norms = [], []
        for gradient in self._gradient.finish():
            gradients.append(gradient)
            norms.append(measure_norm(gradient))
        norm = self.processes.join_norms(norms)
        # Every segment takes the same step: all but the last count it on a copy.
        steps = [*(self._step.clone() for _ in self._segments[1:]), self._step]
        spreading = []
        parts = zip(gradients, self._shards, steps, self._working, self._weights, strict=True)
        for gradient, shard, step, working, weights in parts:
            adamw(
                gradient,
                norm,
                step,
                self.master[shard],
                *(moments[shard] for moments in self._moments),
                working,
                None if ema is None else ema.flat[shard],
                lr=self.lr,
                betas=BETAS,
                eps=EPSILON,
                max_norm=self.grad_clip,
                decay=0.0 if ema is None else ema.decay,
                backend=self.backend,
            )
            spreading.append(self.processes.spread(weights))
        for wait in spreading:
            wait()
        return norm

    @property
    def device(self) -> torch.device:
        return self.master.device

    @property
    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by parameter name, trainable ones only; see `collect`."""
        return self.collect(self.master)

    def fill(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copy into a tensor like `master` what lies in it of tensors by parameter name."""
        for layout, shard in zip(self._segments, self._shards, strict=True):
            layout.fill(flat[shard], tensors, self.processes.rank * (shard.stop - shard.start))

    def collect(self, flat: Tensor) -> dict[str, Tensor]:
        """By parameter name, the tensors of which each process gives its shards, in a tensor like `master`.

        Views of it where the process is alone; of several, rank 0 gets them on its host, and the others none.
        """
        tensors: dict[str, Tensor] = {}

        def take(layout: FlatLayout, shard: slice) -> None:
            whole = self.processes.collect(flat[shard])
            tensors.update({} if whole is None else layout.views(whole))

        parts = zip(self._segments, self._shards, strict=True)
        do_all(partial(take, layout, shard) for layout, shard in parts)
        return tensors

    def full_state(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the model in float32: `trained` (the masters by default) with what is not trained.

        Whole where `collect` gives something: on rank 0.
        """
        return {**self.fixed, **(self.masters if trained is None else trained)}

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set masters, working weights and untrained tensors from a full state dict; ValueError if it does not fit."""
        shapes = {**{name: value.shape for name, value in self.fixed.items()}, **self.shapes}
        problems = [f"{name} is missing" for name in shapes if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in shapes]
        problems += [
            f"{name} has shape {list(state[name].shape)}, here {list(shape)}"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"the weights are of another model: {'; '.join(problems[:3])}{more}")
        self.fill(self.master, state)
        self.fixed = {name: state[name].clone() for name in self.fixed}
        self.model.load_state_dict(state)

    @property
    def shards(self) -> dict[str, Tensor]:
        """What this process holds of the state: `step` [], and of a flat tensor its shards of `master` and moments."""
        return {"step": self._step, "master": self.master, **dict(zip(MOMENTS, self._moments, strict=True))}

    def state_dict(self, shards: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """`step` [], and the moments `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`; see `collect`.

        Args:
            shards: copies of `shards`, to be taken in their place.
        """
        shards = self.shards if shards is None else shards
        state = {"step": shards["step"]}

        def take(kind: str) -> None:
            state.update({f"{kind}.{name}": value for name, value in self.collect(shards[kind]).items()})

        do_all(partial(take, kind) for kind in MOMENTS)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, to any number of processes. ValueError names the first tensor that does not
        fit."""
        shapes = {"step": self._step.shape}
        shapes |= {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in self.shapes.items()}
        if unknown := sorted(set(state) - set(shapes)):
            raise ValueError(f"optimizer state of another model or model.freeze: {unknown[0]} is not here; {REMEDY}")
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                raise ValueError(
                    f"optimizer state of another model or model.freeze: {name} is missing or of another shape; {REMEDY}"
                )
        self._step.copy_(state["step"])
        for kind, shard in zip(MOMENTS, self._moments, strict=True):
            self.fill(shard, {name: state[f"{kind}.{name}"] for name in self.shapes})
