"""Spatial attention: among the S tokens of each frame, with RMS QK-norm.

    y = softmax(norm(q) · norm(k)ᵀ / sqrt(D)) · v   within each frame and head

Replaces in ST-DiT-2: everything between `attn.qkv` and `attn.proj`.

Kernels: attention/spatial_forward.py and _backward.py; one launch of each serves all frames of a pack that are of one
class (`shape_classes`). Before either, attention/spatial_preparation.py for longer frames.
Limits: float32, float16, bfloat16; D a multiple of 8 up to 128; 3·S·H·D < 2³¹ and 2·N·H < 2³¹.

Letters: N tokens, H heads, D head size, S tokens of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias_gradient import collect_bias_gradient_reference
from .checks import check_epsilon, check_head_size, check_reach, check_self_attention
from .dispatch import choose_backend
from .layout import PackLayout
from .qk_norm_rotary import rms_norm_reference
from .registration import contiguous, empty_as, kernel_op, promote
from .rows.tile_sums import launch_sum_tiles
from .sequence_attention import attend_sequences


def spatial_attention_reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, layout: PackLayout, eps: float = 1e-6
) -> Tensor:
    outputs = []
    for run in layout.runs:
        rows = qkv[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos * run.frames, run.frame_tokens, *rows.shape[1:])
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # each [frames, H, S, D]
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
        output = attend_sequences(q, k.to(q.dtype), v.to(q.dtype))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output.to(qkv.dtype)


def spatial_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackLayout,
    *,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Attends within each frame of a pack.

    Args:
        qkv: [N, 3, H, D], output of the qkv Linear.
        q_weight, k_weight: [D] weights of the QK-norm; both None for no norm.
        layout: the pack's layout.
        qkv_bias: [3, H, D] bias of that Linear, which qkv holds already. It receives its gradient here, so the Linear
            is to be given `bias.detach()`; see `bias_gradient`.
        eps: of the RMS norm; Triton takes 1e-30 and more.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        [N, H, D] in the dtype of qkv.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "spatial_attention"
    check_self_attention(op, qkv, q_weight, k_weight, layout, qkv_bias)
    if choose_backend(op, backend, qkv, q_weight, k_weight) == "reference":
        qkv = collect_bias_gradient_reference(qkv, qkv_bias)
        return spatial_attention_reference(qkv, q_weight, k_weight, layout, eps)
    _, _, heads, head_size = qkv.shape
    check_head_size(op, head_size)
    check_epsilon(op, q_weight, eps)
    check_reach(op, "a frame", layout.max_frame_tokens, 3 * heads * head_size)
    check_reach(op, "a pack", layout.num_tokens, 2 * heads)
    runs = [number for run in layout.runs for number in (run.videos * run.frames, run.frame_tokens)]
    return _spatial_attention(qkv, q_weight, k_weight, qkv_bias, runs, eps)[0]


# ---- registration: tensors and numbers only; `runs` is what attention/tables.py calls by that name ----


@kernel_op("opensora_fast::spatial_attention")
def _spatial_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    qkv_bias: Tensor | None,
    runs: list[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output [N, H, D] and the statistics of `launch_forward`."""
    from .attention.spatial_forward import launch_forward

    output, statistics = _allocate_outputs(qkv, q_weight)
    launch_forward(*contiguous(qkv, q_weight, k_weight), output, statistics, runs, eps)
    return output, statistics


@_spatial_attention.register_fake
def _(qkv, q_weight, k_weight, qkv_bias, runs, eps):
    return _allocate_outputs(qkv, q_weight)


def _allocate_outputs(qkv: Tensor, q_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    num_tokens, _, heads, head_size = qkv.shape
    rows = 1 if q_weight is None else 3
    return (
        qkv.new_empty(num_tokens, heads, head_size),
        qkv.new_empty(rows, heads, num_tokens, dtype=torch.float32),
    )


@kernel_op("opensora_fast::spatial_attention_backward")
def _spatial_attention_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    qkv_bias: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    runs: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, q_weight, k_weight and qkv_bias; those of what is None are empty."""
    from .attention.spatial_backward import launch_backward
    from .attention.weight_gradients import launch_weight_gradients

    qkv_gradient, q_weight_gradient, k_weight_gradient, bias_gradient = _allocate_gradients(
        qkv, q_weight, k_weight, None
    )
    tensors = contiguous(output_gradient, qkv, q_weight, k_weight)
    parts = launch_backward(*tensors, output, statistics, qkv_gradient, runs, eps)
    if qkv_bias is not None:
        # Within the kernels, whose registers are full, the sums took about twice as long as this pass [H200].
        # PyTorch rounds what it adds up to `dtype` first, so that it must not be narrower.
        bias_gradient = torch.sum(qkv_gradient, 0, dtype=promote(qkv, qkv_bias)).to(qkv_bias.dtype)
    if parts is not None:
        sums = parts.new_empty(parts.shape[1:])
        launch_sum_tiles(parts.flatten(1)[None], [], sums)
        launch_weight_gradients(sums, *tensors[2:], q_weight_gradient, k_weight_gradient)
    return qkv_gradient, q_weight_gradient, k_weight_gradient, bias_gradient


@_spatial_attention_backward.register_fake
def _(output_gradient, qkv, q_weight, k_weight, qkv_bias, output, statistics, runs, eps):
    return _allocate_gradients(qkv, q_weight, k_weight, qkv_bias)


def _allocate_gradients(qkv: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_as(qkv), *[qkv.new_empty(0) if other is None else empty_as(other) for other in others]


def _setup_context(ctx, inputs, output) -> None:
    qkv, q_weight, k_weight, qkv_bias, ctx.runs, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, q_weight, k_weight, qkv_bias if ctx.needs_input_grad[3] else None, *output)


def _backward(ctx, output_gradient, _):
    if output_gradient is None:
        return (None,) * 6
    gradients = _spatial_attention_backward(output_gradient, *ctx.saved_tensors, ctx.runs, ctx.eps)
    wanted = ctx.needs_input_grad
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)), None, None


_spatial_attention.register_autograd(_backward, setup_context=_setup_context)
