"""A block is computed from its parameters, and the modules inside it are not called: what would go unnoticed so is
refused here."""

from __future__ import annotations

from torch import nn

# The Linears of a block, by the modules that hold them.
BLOCK_LINEARS = {
    "attn": ("qkv", "proj"),
    "attn_temp": ("qkv", "proj"),
    "cross_attn": ("q_linear", "kv_linear", "proj"),
    "mlp": ("fc1", "fc2"),
}


def _name_class(value: object) -> str:
    """With its module, for adapters are named Linear too."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class PlainLinears(nn.Module):
    """Holds Linears whose weights `compute_block` reads: what takes the place of one would never be called."""

    def __setattr__(self, name: str, value: object) -> None:
        held = self.__dict__.get("_modules", {}).get(name)
        if isinstance(held, nn.Linear) and getattr(type(value), "forward", None) is not nn.Linear.forward:
            raise ValueError(
                f"{type(self).__name__}.{name} takes a plain Linear only, since just its weights are read: a "
                f"{_name_class(value)} in its place would change nothing. Add what it learns to the weight, as "
                "torch.nn.utils.parametrize does, or use Open-Sora's own model without use_kernels"
            )
        super().__setattr__(name, value)


def find_bypassed(block: nn.Module) -> str | None:
    """What inside a block computes something else than its parameters say, or is to do something when it is called:
    `compute_block` reads parameters and calls nothing.

    `compute_block` asks in each call, since hooks, adapters and wrappers come at any time.
    """
    plain = nn.Linear.forward
    for name, module in block._modules.items():
        if module is None or name == "parametrizations":
            continue
        if isinstance(module, PlainLinears) and type(module).forward is not nn.Module.forward:
            return f"{name} is a {_name_class(module)} with a forward"
        inside = module._modules
        for held_name in BLOCK_LINEARS.get(name, ()):
            held = inside.get(held_name)
            if held is None:
                return f"{name} is a {_name_class(module)}"
            if getattr(type(held), "forward", None) is not plain:
                return f"{name}.{held_name} is not a plain Linear but {_name_class(held)}"
        for child in (module, *inside.values()):
            if child is not None:
                state = child.__dict__
                if (
                    state["_forward_hooks"]
                    or state["_forward_pre_hooks"]
                    or state["_backward_hooks"]
                    or state["_backward_pre_hooks"]
                    or "forward" in state
                ):
                    return _describe_call(block, child)
    return None


def _describe_call(block: nn.Module, module: nn.Module) -> str:
    name = next(name for name, held in block.named_modules() if held is module)
    if "forward" in vars(module):
        return f"{name}.forward is replaced"
    return f"{name} has a {'forward' if module._forward_hooks or module._forward_pre_hooks else 'backward'} hook"
