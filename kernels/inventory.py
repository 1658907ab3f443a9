"""The list of ops: what each replaces in the model, its limits, and whether it has a Triton kernel."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import torch

from .dispatch import TRITON_DTYPES

# In the order in which a block uses them, then the optimizer.
OPS = (
    "patchify",
    "modulated_norm",
    "linear",
    "spatial_attention",
    "gate_residual_modulated_norm",
    "qk_norm_rotary",
    "temporal_attention",
    "gate_residual",
    "project_residual",
    "cross_attention",
    "mlp",
    "gelu_tanh",
    "adamw",
)


@dataclass(frozen=True)
class Op:
    """One line of the inventory; `replaces` and `limits` come from the docstring of the op's module."""

    name: str
    replaces: str
    dtypes: str
    limits: str
    status: str


def list_ops() -> list[Op]:
    return [_describe(name) for name in OPS]


def _describe(name: str) -> Op:
    text = importlib.import_module(f"{__package__}.{name}").__doc__ or ""
    registered = [hasattr(torch.ops.opensora_fast, op) for op in (name, f"{name}_backward")]
    status = {
        (True, True): "Triton, forward and backward",
        (True, False): "Triton, no backward",
        (False, False): "plain PyTorch",
    }[tuple(registered)]
    floats = TRITON_DTYPES if registered[0] else (*TRITON_DTYPES, torch.float64)
    return Op(
        name=name,
        replaces=_paragraph(text, "Replaces in (?:ST-DiT-2|training):"),
        dtypes=", ".join(str(dtype).removeprefix("torch.") for dtype in floats),
        limits=_paragraph(text, "Limits:"),
        status=status,
    )


def _paragraph(text: str, heading: str) -> str:
    """What follows `heading`, a pattern, up to the end of its paragraph, on one line; empty where there is none."""
    found = re.search(heading + r"(.*?)(?:\n\s*\n|\Z)", text, flags=re.DOTALL)
    return " ".join(found.group(1).split()).rstrip(".") if found else ""
