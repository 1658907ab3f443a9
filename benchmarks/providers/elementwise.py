"""Every implementation of the four ops between the matrix products that this machine may have, on the same inputs.

`modulated_norm`, `gate_residual`, `gate_residual_modulated_norm` and `gelu_tanh`. A library that only has a LayerNorm
gets its modulation, gate and residual from eager PyTorch, as a user of that library would write it.

Letters: N tokens, C channels, K channels of the MLP, B videos, R rows of the modulation table, F frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opensora_fast import kernels
from opensora_fast.costs.operations import Count
from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.token_rows import token_rows

from ..measuring.provider import (
    Bound,
    Outputs,
    Provider,
    compiled,
    compiles_on_cuda,
    needs_cuda,
    needs_module,
    of_function,
    own_version,
    version_of,
)
from ..shapes import Pack
from .op_work import OpWork
from .upstream import modulate, select_frames

OPS = ("modulated_norm", "gate_residual", "gate_residual_modulated_norm", "gelu_tanh")
EPS = 1e-6
Norm = Callable[[Tensor], Tensor]  # [N, C] → [N, C], LayerNorm without affine

# Rows of C (gelu_tanh: of K) elements that an op must read and write: forward, backward.
ROWS_MOVED = {
    "modulated_norm": (2, 3),  # x → y; dy, x → dx
    "gate_residual": (3, 3),  # x, branch → y; dy, branch → d_branch (dx is dy)
    "gate_residual_modulated_norm": (4, 6),  # x, branch → residual, normed; their gradients, residual, branch → two
    "gelu_tanh": (2, 3),  # x → y; dy, x → dx
}


@dataclass(frozen=True)
class ElementwiseWork(OpWork):
    """Inputs of one op.

    Attributes:
        x_mask: bool [B, T], False = given frame; None: no frame is given.
    """

    op: str
    layout: PackLayout
    frame_rows: Tensor
    leaves: dict[str, Tensor]
    x_mask: Tensor | None

    @property
    def is_uniform(self) -> bool:
        return len(self.layout.runs) == 1


def make_elementwise_work(
    op: str, pack: Pack, device: str, dtype: torch.dtype, channels: int, given_frames: bool = False
) -> ElementwiseWork:
    """Random inputs of an op for the videos of a pack; `given_frames`: the first quarter of each video is given.

    Raises:
        ValueError: an unknown op, or given frames in a pack of different shapes.
    """
    if op not in OPS:
        raise ValueError(f"op {op!r} is unknown; choose one of {', '.join(OPS)}")
    layout = PackLayout.of(pack.shapes, device)
    x_mask = None
    if given_frames:
        if not pack.is_uniform:
            raise ValueError(f"{pack.name}: given frames are measured on videos of one shape")
        frames = pack.parts[0].frames
        x_mask = (torch.arange(frames, device=device) >= max(frames // 4, 1)).expand(layout.num_videos, -1)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return values.to(dtype).requires_grad_()

    tokens, rows = layout.num_tokens, layout.num_videos * (2 if given_frames else 1)
    if op == "gelu_tanh":
        leaves = {"x": draw(tokens, 4 * channels), "bias": draw(4 * channels)}
    else:
        leaves = {"x": draw(tokens, channels)}
        if op != "modulated_norm":
            leaves |= {"branch": draw(tokens, channels), "gate": draw(rows, channels), "bias": draw(channels)}
        if op != "gate_residual":
            leaves |= {name: draw(rows, channels, scale=0.3) for name in ("shift", "scale")}
    return ElementwiseWork(op, layout, layout.modulation_rows(x_mask), leaves, x_mask)


def count_elementwise(op: str, tokens: int, channels: int, element: int) -> tuple[Count, Count]:
    """(forward, forward and backward): bytes; the few operations on each element do not bound these ops."""
    forward, backward = ROWS_MOVED[op]
    row = tokens * element * channels * (4 if op == "gelu_tanh" else 1)
    return Count(0.0, float(forward * row)), Count(0.0, float((forward + backward) * row))


def own_call(work: ElementwiseWork, backend: str) -> Outputs:
    """The op of `opensora_fast.kernels`."""
    leaves = work.leaves
    if work.op == "gelu_tanh":
        return kernels.gelu_tanh(leaves["x"], leaves["bias"], backend=backend)
    function = getattr(kernels, work.op)
    return function(**leaves, frame_rows=work.frame_rows, layout=work.layout, backend=backend)


def upstream_call(work: ElementwiseWork) -> Outputs:
    """Each elementwise step on its own, given and noised frames modulated separately; videos of one shape."""
    leaves = work.leaves
    if work.op == "gelu_tanh":
        return torch.nn.functional.gelu(leaves["x"] + leaves["bias"], approximate="tanh")
    videos = work.layout.num_videos
    tables = {
        name: (leaves[name][:videos, None], leaves[name][videos:, None])
        for name in ("shift", "scale", "gate")
        if name in leaves
    }

    def select(function: Callable[[int], Tensor]) -> Tensor:
        return function(0) if work.x_mask is None else select_frames(work.x_mask, function(0), function(1))

    x = leaves["x"].unflatten(0, (videos, -1))
    residual = None
    if "branch" in leaves:
        branch = (leaves["branch"] + leaves["bias"]).unflatten(0, (videos, -1))
        x = x + select(lambda table: tables["gate"][table] * branch)
        residual = x.flatten(0, 1)
        if work.op == "gate_residual":
            return residual
    normed = select(lambda table: modulate(x, tables["shift"][table], tables["scale"][table])).flatten(0, 1)
    return normed if residual is None else (residual, normed)


def with_norm(norm: Norm) -> Callable[[ElementwiseWork], Outputs]:
    """The op in eager PyTorch, with a library's LayerNorm, and modulation by broadcast."""

    def call(work: ElementwiseWork) -> Outputs:
        leaves = work.leaves
        rows = {
            name: token_rows(leaves[name], work.frame_rows, work.layout)
            for name in ("gate", "shift", "scale")
            if name in leaves
        }
        x = leaves["x"]
        if "branch" in leaves:
            x = x + rows["gate"] * (leaves["branch"] + leaves["bias"])
        normed = norm(x) * (1 + rows["scale"]) + rows["shift"]
        return (x, normed) if "branch" in leaves else normed

    return call


def apex_norm(x: Tensor) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm

    return fused_layer_norm(x, (x.shape[-1],), EPS)


def _prepare_liger(work: ElementwiseWork) -> Bound:
    """Liger's norm has an affine part; ones and zeros make it plain."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x = work.leaves["x"]
    ones, zeros = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    return partial(with_norm(lambda x: LigerLayerNormFunction.apply(x, ones, zeros, EPS)), work)


def _prepare_compiled(work: ElementwiseWork) -> Bound:
    function = compiled(lambda work: own_call(work, "reference"))
    return lambda: function(work)


def _one_shape(work: ElementwiseWork) -> str:
    return "" if work.op == "gelu_tanh" or work.is_uniform else "takes videos of one shape only"


def _has_norm(work: ElementwiseWork) -> str:
    if work.op in ("gate_residual", "gelu_tanh"):
        return f"has no part in {work.op}"
    return needs_cuda(work)


APEX, LIGER = ("apex",), ("liger-kernel", "liger_kernel")

ELEMENTWISE_PROVIDERS = (
    Provider("upstream", of_function(upstream_call), _one_shape),
    Provider("eager", of_function(lambda work: own_call(work, "reference"))),
    Provider("compile", _prepare_compiled, compiles_on_cuda),
    Provider(
        "apex",
        of_function(with_norm(apex_norm)),
        needs_module("apex.normalization", APEX, _has_norm),
        version_of(APEX),
    ),
    Provider(
        "liger",
        _prepare_liger,
        needs_module("liger_kernel.ops.layer_norm", LIGER, _has_norm),
        version_of(LIGER),
    ),
    Provider("ours", of_function(lambda work: own_call(work, "triton")), needs_cuda, own_version),
)
ELEMENTWISE_REFERENCE = ELEMENTWISE_PROVIDERS[1]
