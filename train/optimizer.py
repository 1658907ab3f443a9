"""AdamW on float32 weights, for a model that computes in float32 or bfloat16.

Open-Sora 1.1 trains with HybridAdam in AdamW mode, weight decay 0, beneath ZeRO in bf16: the model holds bf16 working
weights, the optimizer their float32 masters, gradients are brought to float32, clipped to a global norm and applied to
the masters, which are then rounded into the working weights. The same here, in one process.

Weights, moments and average each lie in one flat tensor, of which those by name are views: a step of 768 M parameters
in some 800 tensors is then a handful of launches (see `opensora_fast.kernels.adamw`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opensora_fast.kernels import adamw
from opensora_fast.train.ema import EMA
from opensora_fast.train.flat import FlatLayout

BETAS = (0.9, 0.999)
EPSILON = 1e-8


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

    Attributes:
        layout: where each trainable parameter lies in a flat tensor.
        masters: float32 weights by parameter name, trainable ones only.
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
        self.layout = FlatLayout({name: parameter.shape for name, parameter in self._parameters.items()})
        self._dtype = dtype
        self._master = self.layout.gather(self._parameters, torch.float32, device)
        self._working = None if dtype == torch.float32 else self._master.to(dtype)
        working = self._master if self._working is None else self._working
        for name, view in self.layout.views(working).items():
            self._parameters[name].data = view
        model.to(device, dtype)
        self.masters = self.layout.views(self._master)
        self._moments = [torch.zeros_like(self._master) for _ in range(2)]
        self._step = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, ema: EMA | None = None) -> Tensor:
        """Clip, apply and clear the gradients of the model; let the average follow.

        Nothing changes if the gradient is not finite: weights, state and average stay as they are.

        Returns:
            The global gradient norm before clipping, float32 [] on the device; reading it is left to the caller.

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
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        adamw(
            gradient,
            norm,
            self._step,
            self._master,
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
        return norm

    @property
    def device(self) -> torch.device:
        return self._master.device

    def full_state(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the model in float32: `trained` (the masters by default) with what is not trained."""
        return {**self.fixed, **(self.masters if trained is None else trained)}

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set masters, working weights and untrained tensors from a full state dict; ValueError if it does not fit."""
        own = self.full_state()
        problems = [f"{name} is missing" for name in own if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in own]
        problems += [
            f"{name} has shape {list(state[name].shape)}, here {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"the weights are of another model: {'; '.join(problems[:3])}{more}")
        for name, value in self.masters.items():
            value.copy_(state[name])
        self.fixed = {name: state[name].clone() for name in self.fixed}
        self.model.load_state_dict(self.full_state())

    def state_dict(self) -> dict[str, Tensor]:
        """`step` [], and the moments `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`."""
        return {"step": self._step, **self._named_moments()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave. ValueError names the first tensor that does not fit."""
        own = self.state_dict()
        if unknown := sorted(set(state) - set(own)):
            raise ValueError(f"optimizer state of another model: {unknown[0]} is not here")
        for name, value in own.items():
            if name not in state or state[name].shape != value.shape:
                raise ValueError(f"optimizer state of another model: {name} is missing or of another shape")
        for name, value in own.items():
            value.copy_(state[name])

    def _named_moments(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": view
            for kind, flat in zip(("exp_avg", "exp_avg_sq"), self._moments, strict=True)
            for name, view in self.layout.views(flat).items()
        }
