"""AdamW on float32 weights, for a model that computes in float32 or bfloat16.

Open-Sora 1.1 trains with HybridAdam in AdamW mode, weight decay 0, beneath ZeRO in bf16: the model holds bf16 working
weights, the optimizer their float32 masters, gradients are brought to float32, clipped to a global norm and applied to
the masters, which are then rounded into the working weights. The same here.

Weights, moments and average each lie in one flat tensor, of which those by name are views: a step of 768 M parameters
in some 800 tensors is then a handful of launches (see `opensora_fast.kernels.adamw`).

Of several processes each holds the masters, moments and average of one shard of the flat tensor (ZeRO stage 1): the
gradients are averaged into shards, each process updates its own, and the new working weights are spread. DDP would keep
all of it on every device. It also changes its buckets after the first step, and with them the order in which more than
two processes' gradients are added: a resumed run would not be exact. Here the order depends on the layout alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opensora_fast.kernels import adamw
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.ema import EMA
from opensora_fast.train.flat import FlatLayout

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW over the trainable parameters of a model, which it moves to its working dtype and device.

    Args:
        model: in float32, on any device, with its initial weights. Moved in place to `device` and `dtype`; afterwards
            its trainable parameters are views of one tensor and must stay where they are.
        dtype: working dtype, float32 or bfloat16. In float32 the parameters are their own masters.
        device: where the model trains.
        lr: learning rate.
        grad_clip: largest global norm of the gradient; None or 0 does not clip.
        backend: of the step: "auto", "reference" or "triton"; "auto" is Triton on CUDA.
        processes: those that train the model together, each with the same initial weights; None is this one alone.
            What needs all of them (`step`, `masters`, `full_state`, `state_dict`) every one must call.

    Attributes:
        layout: where each trainable parameter lies in a flat tensor.
        shard: the part of a flat tensor that this process updates: the whole one if it is alone.
        master: float32 weights of the shard.
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
            name: value.detach().float().cpu().clone() if value.is_floating_point() else value.detach().cpu().clone()
            for name, value in model.state_dict().items()
            if name not in self._parameters
        }
        self.processes = Processes(device) if processes is None else processes
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self.layout = FlatLayout(shapes, self.processes.world_size)
        length = self.layout.size // self.processes.world_size
        self.shard = slice(self.processes.rank * length, (self.processes.rank + 1) * length)
        self._dtype = dtype
        self._weights = self.layout.gather(self._parameters, dtype, device)
        self._working = None
        self.master = self._weights[self.shard]
        if dtype != torch.float32:
            self._working = self.master
            self.master = torch.zeros(length, device=device)
            self.layout.fill(self.master, self._parameters, self.shard.start)
        for name, view in self.layout.views(self._weights).items():
            self._parameters[name].data = view
        model.to(device, dtype)
        self._moments = [torch.zeros_like(self.master) for _ in range(2)]
        self._step = torch.zeros((), device=device)
        # Weights drawn on processors of different kinds may differ in the last bit.
        self.processes.spread(self._weights)

    @torch.no_grad()
    def step(self, ema: EMA | None = None) -> Tensor:
        """Average over the processes, clip, apply and clear the gradients of the model; let the EMA follow.

        Nothing changes if the gradient is not finite: weights, state and average stay as they are.

        Returns:
            The norm of the averaged gradient before clipping, float32 [] on the device; the caller reads it.

        Raises:
            ValueError: a trainable parameter has no gradient.
        """
        missing = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"no gradient of {missing[0]}{more}: call backward before step")
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        gradient = self.layout.gather(gradients, self._dtype, self.device)
        del gradients
        for parameter in self._parameters.values():
            parameter.grad = None
        gradient = self.processes.average(gradient)
        norm = self.processes.join_norms(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        adamw(
            gradient,
            norm,
            self._step,
            self.master,
            *self._moments,
            self._working,
            None if ema is None else ema.flat,
            lr=self.lr,
            betas=BETAS,
            eps=EPSILON,
            max_norm=self.grad_clip,
            decay=0.0 if ema is None else ema.decay,
            backend=self.backend,
        )
        self.processes.spread(self._weights)
        return norm

    @property
    def device(self) -> torch.device:
        return self.master.device

    @property
    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by parameter name, trainable ones only; see `collect`."""
        return self.collect(self.master)

    def collect(self, shard: Tensor) -> dict[str, Tensor]:
        """By parameter name, the tensors of a flat one of which each process gives its shard.

        Views of it where the process is alone; of several, rank 0 gets them on its host, and the others none.
        """
        whole = self.processes.collect(shard)
        return {} if whole is None else self.layout.views(whole)

    def full_state(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the model in float32: `trained` (the masters by default) with what is not trained.

        Whole where `collect` gives something: on rank 0.
        """
        return {**self.fixed, **(self.masters if trained is None else trained)}

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set masters, working weights and untrained tensors from a full state dict; ValueError if it does not fit."""
        shapes = {**{name: value.shape for name, value in self.fixed.items()}, **self.layout.shapes}
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
        self.layout.fill(self.master, state, self.shard.start)
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
        moments = {f"{kind}.{name}": value for kind in MOMENTS for name, value in self.collect(shards[kind]).items()}
        return {"step": shards["step"], **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, to any number of processes. ValueError names the first tensor that does not
        fit."""
        shapes = {"step": self._step.shape}
        shapes |= {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in self.layout.shapes.items()}
        if unknown := sorted(set(state) - set(shapes)):
            raise ValueError(f"optimizer state of another model: {unknown[0]} is not here")
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                raise ValueError(f"optimizer state of another model: {name} is missing or of another shape")
        self._step.copy_(state["step"])
        for kind, shard in zip(MOMENTS, self._moments, strict=True):
            moments = {name: state[f"{kind}.{name}"] for name in self.layout.shapes}
            self.layout.fill(shard, moments, self.shard.start)
