"""Gate and residual, alone or followed by the next modulated norm in the same pass.

    residual = x + gate[row] · (branch + bias)
    normed   = LN(residual) · (1 + scale[row]) + shift[row]

`gate=None` stands for a gate of one (cross-attention). The bias belongs to the Linear that made `branch`; it is added
here because its gradient is then a by-product of this op's backward.

Replaces in ST-DiT-2: the gate, frame-mask selection and residual after each branch, and the modulated norm behind it.

Letters: N tokens, C channels, F frames, R rows of the modulation table.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_modulation, check_tensor, check_tokens
from .dispatch import choose
from .layout import PackLayout
from .modulated_norm import modulated_norm_reference


def gate_residual_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, frame_rows: Tensor, layout: PackLayout, bias: Tensor | None = None
) -> Tensor:
    if bias is not None:
        branch = branch + bias
    if gate is not None:
        branch = gate[frame_rows[layout.token_frame]] * branch
    return x + branch


def _check(op: str, x: Tensor, branch: Tensor, frame_rows: Tensor, layout: PackLayout, bias: Tensor | None, **tables):
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
        frame_rows: int32 [F], from `layout.modulation_rows`.
        layout: the pack's layout.
        bias: [C] or None.
        backend: "auto", "reference" or "triton".

    Returns:
        [N, C], the new residual stream.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    _check("gate_residual", x, branch, frame_rows, layout, bias, gate=gate)
    choose("gate_residual", backend, x, has_triton=False)
    return gate_residual_reference(x, branch, gate, frame_rows, layout, bias)


def gate_residual_modulated_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    frame_rows: Tensor,
    layout: PackLayout,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds a gated branch to the residual stream and makes the input of the next branch.

    Args:
        x, branch, gate, frame_rows, layout, bias: as in `gate_residual`.
        shift, scale: [R, C] of the next modulated norm.
        eps: added to the variance.
        backend: "auto", "reference" or "triton".

    Returns:
        (residual [N, C], normed [N, C]).

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "gate_residual_modulated_norm"
    _check(op, x, branch, frame_rows, layout, bias, gate=gate, shift=shift, scale=scale)
    choose(op, backend, x, has_triton=False)
    residual = gate_residual_reference(x, branch, gate, frame_rows, layout, bias)
    return residual, modulated_norm_reference(residual, shift, scale, frame_rows, layout, eps)
