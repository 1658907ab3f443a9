"""AdamW on float32 weights, for a model that computes in float32 or bfloat16.

Open-Sora 1.1 trains with HybridAdam in AdamW mode, weight decay 0, beneath ZeRO in bf16: the model holds bf16 working
weights, the optimizer their float32 masters, gradients are brought to float32, clipped to a global norm and applied to
the masters, which are then rounded into the working weights. The same here, in one process.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class MasterAdamW:
    """AdamW over the trainable parameters of a model, which it moves to its working dtype and device.

    Args:
        model: in float32, on any device, with its initial weights. Moved in place to `device` and `dtype`.
        dtype: working dtype, float32 or bfloat16. In float32 the parameters are their own masters.
        device: where the model trains.
        lr: learning rate.
        grad_clip: largest global norm of the gradient; None or 0 does not clip.

    Attributes:
        masters: float32 weights by parameter name, trainable ones only.
        fixed: float32 weights and buffers that are not trained, by name, on the CPU.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device, lr: float, grad_clip: float | None
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: train in float32 or bfloat16")
        self.model = model
        self.grad_clip = grad_clip or None
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trainable:
            raise ValueError("the model has no trainable parameter: check model.freeze")
        self.fixed = {
            name: value.detach().float().cpu().clone() if value.is_floating_point() else value.detach().cpu().clone()
            for name, value in model.state_dict().items()
            if name not in trainable
        }
        originals = {name: parameter.detach() for name, parameter in model.named_parameters() if name in trainable}
        if dtype == torch.float32:
            model.to(device)
            self.masters = {name: value for name, value in model.named_parameters() if name in trainable}
        else:
            self.masters = {name: nn.Parameter(value.to(device, copy=True)) for name, value in originals.items()}
            model.to(device, dtype)
        self._parameters = {name: value for name, value in model.named_parameters() if name in trainable}
        # The fused step takes `found_inf`, which lets a step with a broken gradient be skipped without asking the GPU.
        self.adam = torch.optim.AdamW(
            list(self.masters.values()), lr=lr, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip, apply and clear the gradients of the model; weights and state stay as they are if they are not finite.

        Returns:
            The global gradient norm before clipping, float32 [] on the device; reading it is left to the caller.
        """
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if not gradients:
            raise ValueError("no gradient: call backward before step")
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.grad_clip, norm)
        self.adam.found_inf = (~torch.isfinite(norm)).float()
        self.adam.step()
        for name, parameter in self._parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])
        self.adam.zero_grad(set_to_none=True)
        return norm

    def full_state(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the model in float32: `trained` (the masters by default) with what is not trained."""
        return {**self.fixed, **{name: value.detach() for name, value in (trained or self.masters).items()}}

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
        """Moments and step counts, `exp_avg.<parameter>` and so on; empty before the first step."""
        return {
            f"{kind}.{name}": tensor
            for name, master in self.masters.items()
            for kind, tensor in self.adam.state.get(master, {}).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave. ValueError names the first tensor that does not fit."""
        known = {f"{kind}.{name}" for name in self.masters for kind in ("exp_avg", "exp_avg_sq", "step")}
        if unknown := sorted(set(state) - known):
            raise ValueError(f"optimizer state of another model: {unknown[0]} is not here")
        for name, master in self.masters.items():
            kinds = {kind: state.get(f"{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq", "step")}
            if all(tensor is None for tensor in kinds.values()):
                self.adam.state.pop(master, None)
                continue
            for kind, tensor in kinds.items():
                if tensor is None or (kind != "step" and tensor.shape != master.shape):
                    raise ValueError(f"optimizer state of another model: {kind}.{name} is missing or of another shape")
            self.adam.state[master] = {
                kind: tensor.to(master.device, torch.float32, copy=True) for kind, tensor in kinds.items()
            }
