"""Gate and residual: the gated output of a branch is added to the residual stream.

    y = x + gate[row] · (branch + bias)

`gate=None` stands for a gate of one (cross-attention). The bias belongs to the Linear that made `branch`; it is added
here because its gradient is then a by-product of this op's backward.

Replaces in ST-DiT-2: the gate, frame-mask selection and residual after each branch.

Kernels: rows/residual_norm_forward.py and _backward.py. Limits: float32, float16, bfloat16; C at least 2.

Letters: N tokens, C channels, F frames, R rows of the modulation table.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_modulation, check_tensor, check_tokens
from .dispatch import choose_backend
from .layout import PackLayout
from .registration import empty_as, empty_if, kernel_op, promote
from .rows.residual_norm_tiles import choose_tiles
from .token_rows import token_rows


def gate_residual_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, frame_rows: Tensor, layout: PackLayout, bias: Tensor | None = None
) -> Tensor:
    if bias is not None:
        branch = branch + bias
    if gate is not None:
        branch = token_rows(gate, frame_rows, layout) * branch
    return x + branch


def check_branch(
    op: str,
    x: Tensor,
    branch: Tensor,
    frame_rows: Tensor,
    layout: PackLayout,
    bias: Tensor | None,
    **tables: Tensor | None,
) -> None:
    """As `check_modulation`; branch [N, C], bias [C] or None."""
    check_modulation(op, x, layout, frame_rows, **tables)
    check_tokens(op, "branch", branch, layout, x.shape[1])
    if bias is not None:
        check_tensor(op, "bias", bias, (x.shape[1],), layout.device)


def gate_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    frame_rows: Tensor,
    layout: PackLayout,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds a gated branch to the residual stream.

    Args:
        x: [N, C] residual stream.
        branch: [N, C] output of the branch's last matrix product, its bias not yet added.
        gate: [R, C], or None for a gate of one.
        frame_rows: int32 [F], from `layout.modulation_rows`; tables of B rows go with `layout.frame_video` only.
        layout: the pack's layout.
        bias: [C] or None.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        [N, C], the new residual stream, in the dtype that x, branch, gate and bias promote to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    check_branch("gate_residual", x, branch, frame_rows, layout, bias, gate=gate)
    if choose_backend("gate_residual", backend, x, branch, gate, bias) == "reference":
        return gate_residual_reference(x, branch, gate, frame_rows, layout, bias)
    tables = choose_tiles("gate_residual", layout)
    return _gate_residual(x, branch, gate, bias, frame_rows, *tables)


# ---- registration: tensors and numbers only; the layout's tables come one by one ----


@kernel_op("opensora_fast::gate_residual")
def _gate_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    frame_rows: Tensor,
    tiles: Tensor,
    backward_tiles: Tensor,
    backward_video_tiles: Tensor,
) -> Tensor:
    from .rows.residual_norm_forward import launch_forward

    residual = empty_as(x, promote(x, branch, gate, bias))
    launch_forward(
        "gate_residual",
        x=x,
        branch=branch,
        gate=gate,
        bias=bias,
        residual=residual,
        frame_rows=frame_rows,
        tiles=tiles,
        eps=0.0,
    )
    return residual


@_gate_residual.register_fake
def _(x, branch, gate, bias, frame_rows, tiles, backward_tiles, backward_video_tiles):
    return empty_as(x, promote(x, branch, gate, bias))


@kernel_op("opensora_fast::gate_residual_backward")
def _gate_residual_backward(
    d_residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    frame_rows: Tensor,
    tiles: Tensor,
    video_tiles: Tensor,
    wants_branch: bool,
    wants_gate: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (d_branch [N, C], d_gate [R, C], d_bias [C]); those that are not wanted are empty."""
    from .rows.residual_norm_backward import launch_backward

    outputs = _allocate_gradients(branch, gate, bias, wants_branch, wants_gate, wants_bias)
    launch_backward(
        "gate_residual",
        d_residual=d_residual,
        branch=branch,
        gate=gate,
        bias=bias,
        d_branch=outputs[0] if wants_branch else None,
        d_gate=outputs[1] if wants_gate else None,
        d_bias=outputs[2] if wants_bias else None,
        frame_rows=frame_rows,
        tiles=tiles,
        video_tiles=video_tiles,
    )
    return outputs


@_gate_residual_backward.register_fake
def _(d_residual, branch, gate, bias, frame_rows, tiles, video_tiles, wants_branch, wants_gate, wants_bias):
    return _allocate_gradients(branch, gate, bias, wants_branch, wants_gate, wants_bias)


def _allocate_gradients(
    branch: Tensor, gate: Tensor | None, bias: Tensor | None, wants_branch: bool, wants_gate: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_if(wants_branch, branch),
        empty_if(wants_gate, branch if gate is None else gate),
        empty_if(wants_bias, branch if bias is None else bias),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, branch, gate, bias, frame_rows, _, backward_tiles, backward_video_tiles = inputs
    ctx.save_for_backward(branch, gate, bias, frame_rows, backward_tiles, backward_video_tiles)
    ctx.x_dtype = x.dtype


def _backward(ctx, d_residual):
    branch, gate, bias, *tables = ctx.saved_tensors
    wants_x, wants_branch, wants_gate, wants_bias, *_ = ctx.needs_input_grad
    gradients = [None] * 8
    gradients[0] = d_residual.to(ctx.x_dtype) if wants_x else None
    scaled = wants_branch and gate is not None  # without a gate d_branch is d_residual itself
    if scaled or wants_gate or wants_bias:
        outputs = _gate_residual_backward(d_residual, branch, gate, bias, *tables, scaled, wants_gate, wants_bias)
        for index, (wanted, output) in enumerate(zip((scaled, wants_gate, wants_bias), outputs, strict=True)):
            gradients[1 + index] = output if wanted else None
    if wants_branch and gate is None:
        gradients[1] = d_residual.to(branch.dtype)
    return tuple(gradients)


_gate_residual.register_autograd(_backward, setup_context=_setup_context)
