"""Temporal attention: among the T frames at each place, with rotary embedding, then RMS QK-norm.

    y = softmax(norm(rotate(q)) · norm(rotate(k))ᵀ / sqrt(D)) · v   at each place and head; position = frame index

Replaces in ST-DiT-2: everything between `attn_temp.qkv` and `attn_temp.proj`, the transposes to and from
[places, frames] included: qkv is read in place.

Limits: head size a multiple of 8 up to 128; any number of frames, and packs of any mixture, but where the gradients of
the weights or the bias are wanted, of fewer than 2³¹ / (3·H·D) programs in backward. No atomics: two runs give equal
bits. No gradient of the angles.

Kernels: attention/temporal_forward.py and _backward.py where a tile of 16, 32, 64 or 128 rows holds all frames of a
place, attention/temporal_long_forward.py and _long_backward.py beyond, and for float32 on a GPU. Where several places
share a tile, what is not finite at one of them may spoil the others, of the same video and head.

Letters: N tokens, H heads, D head size, T frames of a video, S tokens of a frame.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .bias_gradient import collect_bias_gradient_reference
from .checks import check_angles, check_epsilon, check_head_size, check_self_attention
from .dispatch import choose_backend
from .launch import ceil_divide
from .layout import PLACE_BLOCK_ROWS, PLACE_TILE_ROWS, PackLayout
from .qk_norm_rotary import rms_norm_reference, rotary_reference
from .registration import contiguous, empty_as, kernel_op
from .rows.tile_sums import launch_sum_tiles
from .sequence_attention import attend_sequences


def temporal_attention_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: PackLayout,
    eps: float = 1e-6,
) -> Tensor:
    outputs = []
    for run in layout.runs:
        rows = qkv[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos, run.frames, run.frame_tokens, *rows.shape[1:])
        q, k, v = rows.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [videos, S, H, T, D]
        q, k = (rotary_reference(z, cos[: run.frames], sin[: run.frames]) for z in (q, k))
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
        q, k, v = (z.flatten(0, 1).to(q.dtype) for z in (q, k, v))
        output = attend_sequences(q, k, v)  # [videos·S, H, T, D]
        output = output.unflatten(0, (run.videos, run.frame_tokens)).permute(0, 3, 1, 2, 4)
        outputs.append(output.flatten(0, 2))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output.to(qkv.dtype)


def temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: PackLayout,
    *,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Attends over time at each place of each video of a pack.

    Args:
        qkv: [N, 3, H, D], output of the qkv Linear.
        q_weight, k_weight: [D] weights of the QK-norm; both None for no norm.
        cos, sin: float32 [at least the longest T, D/2], cosine and sine of frame index · frequency. No gradient.
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
    op = "temporal_attention"
    check_self_attention(op, qkv, q_weight, k_weight, layout, qkv_bias)
    check_angles(op, cos, sin, qkv.shape[3], layout)
    cos, sin = cos.detach(), sin.detach()
    if choose_backend(op, backend, qkv, q_weight, k_weight, cos, sin) == "reference":
        qkv = collect_bias_gradient_reference(qkv, qkv_bias)
        return temporal_attention_reference(qkv, q_weight, k_weight, cos, sin, layout, eps)
    check_head_size(op, qkv.shape[3])
    check_epsilon(op, q_weight, eps)
    cos, sin = cos.float(), sin.float()
    longest = longest_tile(qkv.device, qkv.dtype)
    tables = layout.place_tiles(longest)
    return _temporal_attention(qkv, q_weight, k_weight, qkv_bias, cos, sin, *tables, PLACE_BLOCK_ROWS[longest], eps)[0]


def longest_tile(device: torch.device, dtype: torch.dtype) -> int:
    """The longest video whose frames one tile holds; 0 for none.

    128 rows need the shared memory of sm_90 and sm_100. float32 on a GPU multiplies outside the matrix units, with
    operands in registers, which do not hold all frames of several places.
    """
    if device.type != "cuda":
        return 128
    if dtype == torch.float32:
        return 0
    return 64 if _shared_memory(device) < 200 * 1024 else 128


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# ---- registration: tensors and numbers only; the tables are those of `layout.place_tiles` ----


@kernel_op("opensora_fast::temporal_attention")
def _temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    qkv_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tiles_16: Tensor,
    tiles_32: Tensor,
    tiles_64: Tensor,
    tiles_128: Tensor,
    blocks: Tensor,
    block_rows: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output [N, H, D], and for long videos log2 of each row's sum of exp2 [N, H] (else empty)."""
    from .attention.temporal_forward import launch_forward
    from .attention.temporal_long_forward import launch_long_forward

    output, log_sums = _allocate_outputs(qkv, blocks)
    inputs = contiguous(qkv, q_weight, k_weight, cos, sin)
    for table, rows in zip((tiles_16, tiles_32, tiles_64, tiles_128), PLACE_TILE_ROWS, strict=True):
        launch_forward(*inputs, table, rows, output, eps)
    launch_long_forward(*inputs, blocks, block_rows, output, log_sums, eps)
    return output, log_sums


@_temporal_attention.register_fake
def _(
    qkv,
    q_weight,
    k_weight,
    qkv_bias,
    cos,
    sin,
    tiles_16,
    tiles_32,
    tiles_64,
    tiles_128,
    blocks,
    block_rows,
    eps,
):
    return _allocate_outputs(qkv, blocks)


def _allocate_outputs(qkv: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, _, heads, head_size = qkv.shape
    return (
        qkv.new_empty(num_tokens, heads, head_size),
        qkv.new_empty(num_tokens if blocks.shape[0] else 0, heads, dtype=torch.float32),
    )


@kernel_op("opensora_fast::temporal_attention_backward")
def _temporal_attention_backward(
    output_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    qkv_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tiles_16: Tensor,
    tiles_32: Tensor,
    tiles_64: Tensor,
    tiles_128: Tensor,
    blocks: Tensor,
    block_rows: int,
    output: Tensor,
    log_sums: Tensor,
    eps: float,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, q_weight, k_weight and qkv_bias; those that are not wanted are empty."""
    from .attention.temporal_backward import launch_backward, tiles_of_a_program
    from .attention.temporal_long_backward import launch_long_backward
    from .attention.weight_gradients import launch_weight_gradients

    gradients = _allocate_gradients(qkv, q_weight, k_weight, qkv_bias, wants_weights)
    qkv_gradient, q_weight_gradient, k_weight_gradient, bias_gradient = gradients
    tables = (tiles_16, tiles_32, tiles_64, tiles_128)
    groups = [
        ceil_divide(table.shape[0], tiles_of_a_program(rows))
        for table, rows in zip(tables, PLACE_TILE_ROWS, strict=True)
    ]
    groups.append(blocks.shape[0])
    wants_bias = qkv_bias is not None
    sums, parts = None, [None] * len(groups)
    if wants_weights or wants_bias:
        if 3 * sum(groups) * qkv.shape[2] * qkv.shape[3] >= 2**31:  # what a program adds up is found with 32 bits
            raise ValueError(
                f"temporal_attention: no Triton kernel finds the gradients of {qkv.shape[0]} tokens in videos as short "
                "as these; make the pack smaller, or use backend='reference'"
            )
        # The programs' parts of the gradients of the biases of q, k and v, and of G, see temporal_backward.
        sums = qkv.new_empty(4, sum(groups), *qkv.shape[2:], dtype=torch.float32)
        parts = sums.split(groups, dim=1)
    inputs = contiguous(qkv, q_weight, k_weight, cos, sin)
    output_gradient = output_gradient.contiguous()
    for table, rows, part in zip(tables, PLACE_TILE_ROWS, parts[:-1], strict=True):
        launch_backward(output_gradient, *inputs, table, rows, qkv_gradient, part, wants_bias, wants_weights, eps)
    bias_parts = list(parts[-1][:3]) if wants_bias else [None] * 3
    part = parts[-1][3] if wants_weights else None
    launch_long_backward(
        output_gradient, *inputs, blocks, block_rows, output, log_sums, qkv_gradient, part, bias_parts, eps
    )
    if sums is not None:
        wanted = sums[0 if wants_bias else 3 : 4 if wants_weights else 3]
        weighted = sums.new_empty(sums.shape[2:]) if wants_weights else None
        launch_sum_tiles(wanted.flatten(2), bias_gradient.view(3, 1, -1).unbind() if wants_bias else [], weighted)
        if weighted is not None:
            launch_weight_gradients(weighted, *inputs[1:3], q_weight_gradient, k_weight_gradient)
    return gradients


@_temporal_attention_backward.register_fake
def _(
    output_gradient,
    qkv,
    q_weight,
    k_weight,
    qkv_bias,
    cos,
    sin,
    tiles_16,
    tiles_32,
    tiles_64,
    tiles_128,
    blocks,
    block_rows,
    output,
    log_sums,
    eps,
    wants_weights,
):
    return _allocate_gradients(qkv, q_weight, k_weight, qkv_bias, wants_weights)


def _allocate_gradients(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, qkv_bias: Tensor | None, wants_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (q_weight if wants_weights else None, k_weight if wants_weights else None, qkv_bias)
    return empty_as(qkv), *[qkv.new_empty(0) if tensor is None else empty_as(tensor) for tensor in wanted]


def _setup_context(ctx, inputs, output) -> None:
    qkv, q_weight, k_weight, qkv_bias, *tables, ctx.block_rows, ctx.eps = inputs
    # Short videos recompute everything from qkv: without long ones the output need not be kept.
    output, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.set_materialize_grads(False)
    qkv_bias = qkv_bias if ctx.needs_input_grad[3] else None
    output = output if log_sums.shape[0] else log_sums
    ctx.save_for_backward(qkv, q_weight, k_weight, qkv_bias, *tables, output, log_sums)


def _backward(ctx, output_gradient, _):
    if output_gradient is None:
        return (None,) * 13
    wants_q_weight, wants_k_weight = ctx.needs_input_grad[1:3]
    *inputs, output, log_sums = ctx.saved_tensors
    gradients = _temporal_attention_backward(
        output_gradient, *inputs, ctx.block_rows, output, log_sums, ctx.eps, wants_q_weight or wants_k_weight
    )
    wanted, rest = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:]
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *(
        None for _ in rest
    )


_temporal_attention.register_autograd(_backward, setup_context=_setup_context)
