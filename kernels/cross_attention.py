"""Cross-attention: the tokens of each video attend to the text of that video; text lengths are ragged.

    y = softmax(q · kᵀ / sqrt(D)) · v   over the text tokens of the video; zero where a video has no text

Replaces in ST-DiT-2: everything between `cross_attn.q_linear` / `kv_linear` and `cross_attn.proj`.

Kernels: attention/cross_forward.py and _backward.py for texts of any length, attention/cross_short_forward.py and
_short_backward.py for up to 256 tokens on sm_90, attention/cross_chunks_backward.py behind either. Limits: float32,
float16, bfloat16; D a multiple of 8 up to 128; 2·L·H·D < 2³¹.

Letters: N video tokens, M text tokens, H heads, D head size, L the longest text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias_gradient import collect_bias_gradient_reference
from .checks import check_head_size, check_reach, check_table, check_tensor, check_tokens
from .dispatch import choose_backend
from .layout import PackLayout, TextLayout
from .registration import contiguous, empty_as, kernel_op
from .rows.tile_sums import launch_sum_tiles


def cross_attention_reference(q: Tensor, kv: Tensor, layout: PackLayout, text: TextLayout) -> Tensor:
    # The text is padded to its known bound on the device: lengths that only the GPU knows are never read by the host.
    position = torch.arange(text.max_length, device=q.device)
    real = position < text.lengths[:, None]  # [B, L]
    index = torch.where(real, text.starts[:, None] + position, 0)
    # [B, L, 2, H, D]; without any text zeros that are made of kv, which gets its gradient all the same.
    padded = kv[index] if text.num_tokens else kv.sum().expand(*index.shape, *kv.shape[1:])
    k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, L, D]
    attend = (real | (text.lengths == 0)[:, None])[:, None, None]  # a video without text: any finite softmax, then zero
    has_text = (text.lengths > 0)[:, None, None, None]
    outputs = []
    for run in layout.runs:
        videos = slice(run.first_video, run.first_video + run.videos)
        rows = q[run.first_token : run.first_token + run.tokens]
        rows = rows.view(run.videos, -1, *rows.shape[1:]).transpose(1, 2)  # [videos, H, T·S, D]
        output = torch.nn.functional.scaled_dot_product_attention(
            rows, k[videos].to(rows.dtype), v[videos].to(rows.dtype), attn_mask=attend[videos]
        )
        output = torch.where(has_text[videos], output, 0)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output.to(q.dtype)


def cross_attention(
    q: Tensor,
    kv: Tensor,
    layout: PackLayout,
    text: TextLayout,
    *,
    q_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attends from video tokens to their video's text.

    Args:
        q: [N, H, D], output of the query Linear.
        kv: [M, 2, H, D], output of the key-value Linear.
        layout: the pack's layout.
        text: where each video's text tokens lie in kv.
        q_bias: [H, D] bias of the query Linear, which q holds already. It receives its gradient here, so the Linear is
            to be given `bias.detach()`; see `bias_gradient`.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        [N, H, D] in the dtype of q; zero for the tokens of a video without text.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "cross_attention"
    check_tokens(op, "q", q, layout, None, None)
    check_tensor(op, "kv", kv, (text.num_tokens, 2, q.shape[1], q.shape[2]), layout.device)
    if q_bias is not None:
        check_tensor(op, "q_bias", q_bias, tuple(q.shape[1:]), layout.device)
    if text.lengths.shape != (layout.num_videos,):
        raise ValueError(f"{op}: text describes {text.lengths.shape[0]} videos, the layout {layout.num_videos}")
    for name, table in (("starts", text.starts), ("lengths", text.lengths)):
        check_table(op, f"text.{name}", table, layout.num_videos, layout, "use TextLayout.from_lengths(...)")
    if choose_backend(op, backend, q, kv) == "reference":
        return cross_attention_reference(collect_bias_gradient_reference(q, q_bias), kv, layout, text)
    check_head_size(op, q.shape[2])
    check_reach(op, "a text", text.max_length, 2 * q.shape[1] * q.shape[2])
    runs = [number for run in layout.runs for number in (run.videos, run.frames * run.frame_tokens)]
    return _cross_attention(q, kv.to(q.dtype), q_bias, text.starts, text.lengths, text.max_length, runs)[0]


# ---- registration: tensors and numbers only; `runs` is what attention/tables.py calls by that name ----


@kernel_op("opensora_fast::cross_attention")
def _cross_attention(
    q: Tensor,
    kv: Tensor,
    q_bias: Tensor | None,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    runs: list[int],
) -> tuple[Tensor, Tensor]:
    """Returns the output [N, H, D] and the log sums of `launch_forward`."""
    from .attention.cross_forward import launch_forward

    output, log_sums = _allocate_outputs(q)
    launch_forward(*contiguous(q, kv), output, log_sums, text_starts, text_lengths, max_length, runs)
    return output, log_sums


@_cross_attention.register_fake
def _(q, kv, q_bias, text_starts, text_lengths, max_length, runs):
    return _allocate_outputs(q)


def _allocate_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    output = empty_as(q)
    return output, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@kernel_op("opensora_fast::cross_attention_backward")
def _cross_attention_backward(
    output_gradient: Tensor,
    q: Tensor,
    kv: Tensor,
    q_bias: Tensor | None,
    text_starts: Tensor,
    text_lengths: Tensor,
    output: Tensor,
    log_sums: Tensor,
    max_length: int,
    runs: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, kv and q_bias; the last is empty where it is None."""
    from .attention.cross_backward import launch_backward

    tensors = contiguous(output_gradient, q, kv, output)
    q_gradient, kv_gradient, bias_gradient = gradients = _allocate_gradients(q, kv, q_bias)
    kv_gradient.zero_()
    bias_partials = launch_backward(
        *tensors, log_sums, q_gradient, kv_gradient, q_bias is not None, text_starts, text_lengths, max_length, runs
    )
    if bias_partials is not None:
        launch_sum_tiles(bias_partials[None], [], bias_gradient)
    return gradients


@_cross_attention_backward.register_fake
def _(output_gradient, q, kv, q_bias, text_starts, text_lengths, output, log_sums, max_length, runs):
    return _allocate_gradients(q, kv, q_bias)


def _allocate_gradients(q: Tensor, kv: Tensor, q_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return empty_as(q), empty_as(kv), q.new_empty(0) if q_bias is None else empty_as(q_bias)


def _setup_context(ctx, inputs, output) -> None:
    q, kv, q_bias, text_starts, text_lengths, ctx.max_length, ctx.runs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    q_bias = q_bias if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(q, kv, q_bias, text_starts, text_lengths, *output)


def _backward(ctx, output_gradient, _):
    if output_gradient is None:
        return (None,) * 7
    gradients = _cross_attention_backward(output_gradient, *ctx.saved_tensors, ctx.max_length, ctx.runs)
    wanted = ctx.needs_input_grad
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)), *(None,) * 4


_cross_attention.register_autograd(_backward, setup_context=_setup_context)
