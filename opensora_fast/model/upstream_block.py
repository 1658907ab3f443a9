"""Blocks of Open-Sora 1.1's own class: which modules are one, what changed in it, and its forward on packs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from opensora_fast.kernels import PackLayout, TextLayout

from .backends import Backends
from .block import PackContext, compute_block
from .embedders import rotary_tables
from .parameters_only import BLOCK_LINEARS, find_bypassed

# What a block of Open-Sora 1.1 holds, beside the modules of BLOCK_LINEARS; a module with all of it is taken for one.
BLOCK_TABLES = ("scale_shift_table", "scale_shift_table_temporal")
LINEARS = tuple(f"{name}.{linear}" for name, linears in BLOCK_LINEARS.items() for linear in linears)
QK_NORMS = ("attn.q_norm", "attn.k_norm", "attn_temp.q_norm", "attn_temp.k_norm")
LAYER_NORMS = ("norm1", "norm2", "norm_temp")
METHODS = ("forward", "t_mask_select", "rotate_queries_or_keys")  # in which its classes compute
NORM_EPSILON = 1e-6


def is_upstream_block(module: nn.Module) -> bool:
    """Whether a module holds what a block of Open-Sora 1.1 does."""
    return module._modules.keys() >= BLOCK_LINEARS.keys() and all(hasattr(module, name) for name in BLOCK_TABLES)


def override_blocks(blocks: dict[str, nn.Module], rope: nn.Module, backends: Backends) -> Callable[[], None]:
    """Gives each block a `forward` of its own that computes on packs; returns what takes it away again.

    Args:
        blocks: by the names of messages.
        rope: the rotary embedding of the model that they are in.
        backends: what computes in them.

    Raises:
        ValueError: what a block or its rotary embedding computes is not Open-Sora's, or it is overridden already.
    """
    for name, block in blocks.items():
        if _is_overridden(block):
            raise ValueError(
                f"use_kernels: {name} is replaced already; call undo() of that replacement first (a copy of a changed "
                "model has none: copy it before)"
            )
        if "forward" in vars(block):
            raise ValueError(f"use_kernels: {name}.forward is replaced by something else; call use_kernels before that")
        difference = _find_difference(block, rope)
        if difference is not None:
            raise ValueError(
                f"use_kernels: {name}: {difference}; the kernels compute Open-Sora 1.1's block only: change this back, "
                "or leave use_kernels out"
            )
    ropes = [_get_rope(block, rope) for block in blocks.values()]
    for each in ropes:
        if getattr(each, "interpolate_factor", 1) != 1:
            raise ValueError(
                f"use_kernels: rope has interpolate_factor {each.interpolate_factor:g}; the kernels turn by frame "
                "index · frequency: divide rope.freqs by it instead"
            )
        if each.freqs.requires_grad:
            raise ValueError(
                "use_kernels: rope.freqs is to be trained, and the kernels find no gradient of it; call "
                "rope.freqs.requires_grad_(False) first"
            )
    # Not closures: copies and pickles of the model (its moving average, say) then hold their own parameters.
    forwards = [
        partial(_compute_block, block, each, backends) for block, each in zip(blocks.values(), ropes, strict=True)
    ]
    for block, forward in zip(blocks.values(), forwards, strict=True):
        block.forward = forward

    def undo() -> None:
        for (name, block), forward in zip(blocks.items(), forwards, strict=True):
            if vars(block).get("forward", forward) is not forward:
                raise ValueError(f"undo: {name}.forward was replaced by something else since; take that back first")
        for block in blocks.values():
            vars(block).pop("forward", None)

    return undo


def _is_overridden(block: nn.Module) -> bool:
    return getattr(vars(block).get("forward"), "func", None) is _compute_block


def _find_difference(block: nn.Module, rope: nn.Module) -> str | None:
    """What of a block the kernels would not compute, since they read nothing but its parameters."""
    bypassed = find_bypassed(block)
    if bypassed is not None:
        return bypassed
    for name, module in block.named_modules():
        if "parametrizations" in name.split(".") or name.startswith(tuple(f"{linear}." for linear in LINEARS)):
            continue  # such as the parametrization of a weight
        foreign = _find_foreign_code(module)
        if foreign is not None:
            return f"{name or 'it'} has {foreign}"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} has p={module.p:g}"
        if name in LINEARS:
            if module.bias is None:
                return f"{name} has no bias"
            continue
        known = {"": BLOCK_TABLES, **dict.fromkeys(QK_NORMS, ("weight",))}.get(name, ())
        extra = [own for own, _ in module.named_parameters(recurse=False) if own not in known]
        if extra:
            return f"{name}.{extra[0]} is a parameter that Open-Sora's block lacks".removeprefix(".")
        if not _is_expected(name, module):
            return f"{name} is {module}"
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", NORM_EPSILON))
        if epsilon != NORM_EPSILON:
            return f"{name} has epsilon {epsilon}, not {NORM_EPSILON}"
    return _find_other_attention(block, rope)


def _find_foreign_code(module: nn.Module) -> str | None:
    """What a subclass, or a function put into the class or the module, computes in place of Open-Sora's class."""
    for method in METHODS:
        if method in vars(module):
            return f"{method} replaced"
        classes = [one for one in type(module).__mro__ if method in vars(one) and one is not nn.Module]
        if len(classes) > 1:
            return f"{_name(getattr(classes[0], method))} in place of {_name(getattr(classes[1], method))}"
        if classes and _name(getattr(classes[0], method)) != f"{_name(classes[0])}.{method}":
            return f"{_name(getattr(classes[0], method))} in place of {_name(classes[0])}.{method}"
    return None


def _name(defined: type | Callable) -> str:
    return f"{defined.__module__}.{defined.__qualname__}" if hasattr(defined, "__qualname__") else repr(defined)


def _is_expected(name: str, module: nn.Module) -> bool:
    """Whether a module of a block that is no Linear is what Open-Sora has in this place, or does nothing."""
    if name in QK_NORMS:
        return not isinstance(module, nn.LayerNorm)
    if name in LAYER_NORMS:
        return isinstance(module, nn.LayerNorm) or type(module).__name__ == "FusedLayerNorm"  # of apex
    if name == "mlp.act":
        return isinstance(module, nn.GELU) and module.approximate == "tanh"
    return name in ("", *BLOCK_LINEARS) or isinstance(module, (nn.Identity, nn.Dropout))


def _find_other_attention(block: nn.Module, rope: nn.Module) -> str | None:
    """What upstream's attention modules say in attributes, where it is not as in Open-Sora 1.1."""
    for name, rotates in (("attn", False), ("attn_temp", True)):
        module = getattr(block, name)
        scale = (module.qkv.out_features / 3 / module.num_heads) ** -0.5
        if not math.isclose(getattr(module, "scale", scale), scale, rel_tol=1e-6):
            return f"{name}.scale is {module.scale:g}, not the {scale:g} of its head size"
        if bool(getattr(module, "rope", rotates)) != rotates:
            return f"{name}.rope is {module.rope}"
    turning = _get_rope(block, rope)
    if not isinstance(getattr(turning, "freqs", None), Tensor):
        return "attn_temp.rotary_emb is no method of a rotary embedding"
    foreign = _find_foreign_code(turning)
    if foreign is not None:
        return f"the rotary embedding of attn_temp has {foreign}"
    if not getattr(block.attn_temp, "qk_norm_legacy", True) and not isinstance(block.attn_temp.q_norm, nn.Identity):
        return "attn_temp normalizes queries and keys before it rotates them (qk_norm_legacy=False)"
    return None


def _get_rope(block: nn.Module, rope: nn.Module) -> nn.Module | None:
    """What turns a block's queries and keys: the model's rotary embedding, or its own if it was copied alone."""
    rotate = getattr(block.attn_temp, "rotary_emb", None)
    return rope if rotate is None else getattr(rotate, "__self__", None)


def _compute_block(
    block: nn.Module,
    rope: nn.Module,
    backends: Backends,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    t_tmp: Tensor,
    mask: list[int] | None = None,
    x_mask: Tensor | None = None,
    t0: Tensor | None = None,
    t0_tmp: Tensor | None = None,
    T: int | None = None,
    S: int | None = None,
) -> Tensor:
    """The forward of upstream's block, with its arguments: x [B, T·S, C], y [1, M, C], t [B, 6·C], t_tmp [B, 3·C]."""
    if x.device != block.scale_shift_table.device:
        raise ValueError(
            f"{type(block).__name__}: x is on {x.device}, the parameters that the kernels read on "
            f"{block.scale_shift_table.device}; move the whole model, and for several GPUs use "
            "DistributedDataParallel: nn.DataParallel's copies read the parameters of the first"
        )
    videos, tokens, channels = x.shape
    layout = PackLayout.of([(T, 1, S)] * videos, x.device)
    lengths = mask if mask is not None else [y.shape[1] // videos] * videos
    if x_mask is not None:
        t, t_tmp = torch.cat([t, t0]), torch.cat([t_tmp, t0_tmp])
    cos, sin = rotary_tables(rope.freqs, T)
    context = PackContext(
        layout=layout,
        frame_rows=layout.modulation_rows(x_mask),
        text=y.flatten(0, 1),
        text_layout=TextLayout.from_lengths(lengths, x.device),
        space_and_mlp=t.unflatten(1, (6, channels)),
        time=t_tmp.unflatten(1, (3, channels)),
        cos=cos,
        sin=sin,
        backends=backends,
    )
    output, _ = compute_block(block, x.reshape(videos * tokens, channels), None, context, None)
    return output.view(videos, tokens, channels)
