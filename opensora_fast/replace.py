"""`use_kernels`: choose the kernels of a model, ours or upstream's own instance, without touching its state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from opensora_fast.kernels.dispatch import BACKENDS
from opensora_fast.kernels.linear import LINEAR_BACKENDS, load_quack

from .model.backends import OPS, Backends
from .model.stdit2 import STDiT2
from .model.upstream_block import is_upstream_block, override_blocks


@dataclass(frozen=True)
class Replacement:
    """What `use_kernels` did.

    Attributes:
        replaced: op → names of the modules whose computation now uses the chosen backend.
        backends: op → the chosen backend; of `gelu_tanh` "quack" where quack's products in the MLP end with it.
        undo: restores the model as it was before; ValueError if other code has wrapped what it takes away.
    """

    replaced: dict[str, list[str]]
    backends: dict[str, str]
    undo: Callable[[], None]

    def __str__(self) -> str:
        lines = [f"{op}: {self.backends[op]} in {len(names)} modules" for op, names in self.replaced.items()]
        return "\n".join(lines)


def use_kernels(model: nn.Module, backend: str = "triton", *, linear: str | None = None, **flags: bool) -> Replacement:
    """Chooses the implementation of a model's ops.

    Works on `STDiT2` and on an instance of Open-Sora 1.1's own class, which is recognized by its structure. Only that
    instance changes; parameters, their names and the state dict stay as they are. So the call may come before or after
    the model is copied, cast, moved, sharded, wrapped or boosted, but not after `torch.compile`; a copy of a changed
    model is changed as well.

    Args:
        model: the model, or what has it inside, such as DistributedDataParallel or a Booster's model.
        backend: "triton", "reference", or "auto" (Triton on CUDA, reference elsewhere).
        linear: what multiplies in the Linears on all tokens, forward and for the gradient of their input: "torch" or
            "quack" (see `kernels.linear`); None leaves it as it is.
        **flags: ops to change, by name (`modulated_norm=True, spatial_attention=True, …`); without any, all ops.

    Returns:
        What was replaced, and how to undo it.

    Raises:
        ValueError: an unknown backend or op, no model or several were found, a block or the rotary embedding of
            Open-Sora's that was changed to compute something else, a model that is compiled already, or quack is not
            installed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"use_kernels: give the model itself, a torch.nn.Module, not {type(model).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"use_kernels: backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    for name, flag in flags.items():
        if name not in OPS:
            raise ValueError(f"use_kernels: unknown op {name!r}; known: {', '.join(OPS)}")
        if not isinstance(flag, bool):
            raise ValueError(f"use_kernels: {name} must be True or False, got {flag!r}; give the backend as backend=")
    chosen = {name: backend for name in OPS if flags.get(name, not flags)}
    if linear is not None:
        if linear not in LINEAR_BACKENDS:
            raise ValueError(f"use_kernels: linear {linear!r} is unknown; choose one of {', '.join(LINEAR_BACKENDS)}")
        if linear == "quack":
            load_quack()
        chosen["linear"] = linear
    if not chosen:
        raise ValueError("use_kernels: every flag is False, so nothing would change; leave the call out or name an op")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            "use_kernels: the model is compiled already; call use_kernels before torch.compile, so that no graph is "
            "left that was made without it"
        )
    found = {name: module for name, module in model.named_modules() if _is_model(module)}
    if not found:
        raise ValueError(
            f"use_kernels: {type(model).__name__} is neither an STDiT2 nor built like Open-Sora 1.1's "
            "(blocks with attn, attn_temp, cross_attn, mlp and two scale-shift tables, and rope.freqs), nor is any "
            "module in it"
        )
    if len(found) > 1:
        raise ValueError(
            f"use_kernels: {type(model).__name__} holds several models, {', '.join(found)}; call use_kernels for each"
        )
    (inner,) = found.values()
    if isinstance(inner, STDiT2):
        return _choose_in_own_model(inner, chosen)
    blocks = {name: module for name, module in inner.named_modules() if is_upstream_block(module)}
    backends = replace(Backends.all("reference"), **chosen)
    undo = override_blocks(blocks, inner.rope, backends)
    return Replacement({op: list(blocks) for op in chosen}, _find_computing(chosen, backends), undo)


def _is_model(module: nn.Module) -> bool:
    if isinstance(module, STDiT2):
        return True
    rope = module._modules.get("rope")  # a wrapper only answers for it
    return isinstance(getattr(rope, "freqs", None), Tensor) and any(map(is_upstream_block, module.modules()))


def _choose_in_own_model(model: STDiT2, chosen: dict[str, str]) -> Replacement:
    before = model.backends
    model.backends = after = replace(before, **chosen)
    names = [f"blocks.{index}" for index in range(len(model.blocks))]
    replaced = {op: [*names, "final_layer"] if op == "modulated_norm" else list(names) for op in chosen}

    def undo() -> None:
        model.backends = replace(model.backends, **{name: getattr(before, name) for name in chosen})

    return Replacement(replaced, _find_computing(chosen, after), undo)


def _find_computing(chosen: dict[str, str], backends: Backends) -> dict[str, str]:
    """op → what computes it: the chosen backend, but for the GELU that quack's products end with."""
    if "gelu_tanh" in chosen and backends.linear == "quack":
        return chosen | {"gelu_tanh": "quack"}
    return chosen
