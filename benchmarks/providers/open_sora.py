"""Open-Sora's own ST-DiT-2, of the package `opensora` where it is installed: the baseline that is not this project's.

`pip install` a checkout of v1.1.0 of https://github.com/hpcaitech/Open-Sora with what it requires, xformers among it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_fast.model import STDiT2

from ..measuring.provider import needs_module, nothing_missing, torch_version, version_of
from .elementwise import APEX

OPEN_SORA, FLASH_ATTENTION = ("opensora",), ("flash-attn",)
MODULE = "opensora.models.stdit.stdit2"
# Its training calls .cuda(), its cross-attention xformers.
_needs_open_sora = needs_module(MODULE, OPEN_SORA)
_needs_flash_attention = needs_module("flash_attn.flash_attn_interface", FLASH_ATTENTION)

# What its LayerNorm imports where the configurations' `enable_layernorm_kernel=True` is followed.
_lacks_layer_norm = needs_module("fused_layer_norm_cuda", APEX, nothing_missing)


def open_sora_version() -> str:
    """As in rows, with apex where its LayerNorm is used."""
    names = {"opensora": OPEN_SORA} | ({} if _lacks_layer_norm(None) else {"apex": APEX})
    return " ".join([torch_version(), *(f"{name} {version_of(each)()}" for name, each in names.items())])


def missing_open_sora(flash: bool, work: Any) -> str:
    """Why it cannot compute the work here, "" if it can; `flash`: with flash attention."""
    return _needs_open_sora(work) or (_needs_flash_attention(work) if flash else "")


class _Recomputed(nn.Module):
    """A block that keeps its inputs only. Open-Sora's own call may take the reentrant form, whose gradients cannot be
    asked for by name; both compute the same."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> Any:
        return checkpoint(self.block, *arguments, use_reentrant=False)


def open_sora_view(model: STDiT2, flash: bool, recompute: bool) -> Callable[..., Tensor]:
    """Open-Sora's model on the parameters of `model`, called as `STDiT2.forward`.

    As in its trainer all arguments are on the device, and sizes and frame rates in the model's dtype; as in the
    configurations of all its stages LayerNorm is apex's, where apex is there.
    """
    library = importlib.import_module(MODULE)
    keys = model.config.model_dump(exclude={"upstream_rounding"})
    with torch.device(model.device):
        config = library.STDiT2Config(
            **keys, enable_flash_attn=flash, enable_layernorm_kernel=not _lacks_layer_norm(None)
        )
        view = library.STDiT2(config).to(model.dtype)
    state = model.state_dict(keep_vars=True)
    # Its rotated queries have the dtype of the frequencies, which ours keep in float32 where they do not round.
    state["rope.freqs"] = state["rope.freqs"].to(model.dtype)
    view.load_state_dict(state, assign=True)
    view.train(model.training)
    if recompute:
        view.blocks = nn.ModuleList(_Recomputed(block) for block in view.blocks)

    def call(x: Tensor, timestep: Tensor, y: Tensor, **conditions: Tensor) -> Tensor:
        placed = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype, non_blocking=True)
            for name, value in conditions.items()
        }
        return view(x, timestep.to(model.device, non_blocking=True), y, **placed)

    return call
