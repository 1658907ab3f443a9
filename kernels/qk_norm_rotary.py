"""Rotary embedding, then RMS norm, of queries and keys: upstream's order.

    rotated[2i]   = z[2i] · cos[i] - z[2i+1] · sin[i]
    rotated[2i+1] = z[2i+1] · cos[i] + z[2i] · sin[i]        (interleaved pairs, all D dimensions)
    y = weight · rotated / sqrt(mean(rotated²) + eps)         (statistics in float32, the weight after the cast back)

Replaces in ST-DiT-2: `rope` (temporal attention only), `q_norm` and `k_norm`, where they are not inside the kernels of
spatial and temporal attention.

Limits: head size a multiple of 8 up to 128. No atomics: two runs give equal bits. No gradient of the angles.

Letters: N tokens, H heads, D head size, T frames of a video.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_angles, check_epsilon, check_head_size, check_qk_weights, check_tensor, check_tokens
from .dispatch import choose_backend
from .layout import PackLayout
from .registration import empty_as, empty_if, kernel_op


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input, so that the reference can serve as a measuring stick."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_reference(z: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """z [..., D], weight [D] or None for no norm at all."""
    if weight is None:
        return z
    wide = z.to(statistics_dtype(z.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(z.dtype)


def rotary_reference(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """z [..., D]; cos, sin broadcastable to [..., D/2]."""
    wide = z.to(statistics_dtype(z.dtype))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(z.dtype)


def qk_norm_rotary_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: PackLayout,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    def norm(z: Tensor, weight: Tensor | None) -> Tensor:
        if cos is not None and sin is not None:
            position = layout.frame_position[layout.token_frame]
            rotated = rotary_reference(z, cos[position][:, None], sin[position][:, None])
        else:
            rotated = z
        return rms_norm_reference(rotated, weight, eps).to(z.dtype)

    return norm(q, q_weight), norm(k, k_weight)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: PackLayout,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates the queries and keys of a pack by the angles of their frames and norms them.

    Args:
        q, k: [N, H, D]; views such as `qkv[:, 0]` of [N, 3, H, D] are read in place.
        q_weight, k_weight: [D] weights of the RMS norm; both None for no norm.
        cos, sin: float32 [at least the longest T, D/2], cosine and sine of frame index · frequency; both None for no
            rotation. No gradient.
        layout: the pack's layout.
        eps: of the RMS norm; Triton takes 1e-30 and more.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA, but the reference for float64.

    Returns:
        q and k, [N, H, D] in their own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    op = "qk_norm_rotary"
    check_tokens(op, "q", q, layout, None, None)
    check_tensor(op, "k", k, tuple(q.shape), layout.device)
    check_qk_weights(op, q_weight, k_weight, q.shape[2], layout)
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: give both cos and sin, or neither")
    if cos is not None and sin is not None:
        check_angles(op, cos, sin, q.shape[2], layout)
        cos, sin = cos.detach(), sin.detach()
    elif q_weight is None:
        raise ValueError(f"{op}: neither weights nor angles are given, so there is nothing to do")
    if q.dtype != k.dtype:
        raise ValueError(f"{op}: k has dtype {k.dtype}, but q has {q.dtype}")
    if choose_backend(op, backend, q, k, q_weight, k_weight, cos, sin) == "reference":
        return qk_norm_rotary_reference(q, k, q_weight, k_weight, cos, sin, layout, eps)
    check_head_size(op, q.shape[2])
    check_epsilon(op, q_weight, eps)
    if cos is not None and sin is not None:
        cos, sin = cos.float(), sin.float()
    tiles = layout.frame_tiles(TILE_TOKENS)
    return _qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, tiles, layout.frame_position, eps)


# ---- registration: tensors and numbers only ----

TILE_TOKENS = 16  # tokens of one frame that a program may take; one of layout.FRAME_TILE_SIZES


@kernel_op("opensora_fast::qk_norm_rotary")
def _qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    tiles: Tensor,
    frame_position: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`tiles` is `layout.frame_tiles(TILE_TOKENS)`, `frame_position` the layout's."""
    from .rows.qk_norm_rotary import launch_forward

    outputs = empty_as(q), empty_as(k)
    launch_forward(q, k, q_weight, k_weight, cos, sin, tiles, TILE_TOKENS, frame_position, *outputs, eps)
    return outputs


@_qk_norm_rotary.register_fake
def _(q, k, q_weight, k_weight, cos, sin, tiles, frame_position, eps):
    return empty_as(q), empty_as(k)


@kernel_op("opensora_fast::qk_norm_rotary_backward")
def _qk_norm_rotary_backward(
    q_gradient: Tensor,
    k_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    tiles: Tensor,
    frame_position: Tensor,
    eps: float,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, q_weight and k_weight; the last two are empty where they are not wanted."""
    from .rows.qk_norm_rotary import launch_backward

    q_raw, k_raw, *weights = _allocate_gradients(q, k, q_weight, k_weight, wants_weights)
    sums = launch_backward(
        q_gradient,
        k_gradient,
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        tiles,
        TILE_TOKENS,
        frame_position,
        q_raw,
        k_raw,
        eps,
        wants_weights,
    )
    if sums is not None:
        for weight, total in zip(weights, sums, strict=True):
            weight.copy_(total)
    return q_raw, k_raw, *weights


@_qk_norm_rotary_backward.register_fake
def _(q_gradient, k_gradient, q, k, q_weight, k_weight, cos, sin, tiles, frame_position, eps, wants_weights):
    return _allocate_gradients(q, k, q_weight, k_weight, wants_weights)


def _allocate_gradients(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, wants_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = (empty_if(wants_weights, q if weight is None else weight) for weight in (q_weight, k_weight))
    return empty_as(q), empty_as(k), *weights


def _setup_context(ctx, inputs, output) -> None:
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps = eps


def _backward(ctx, q_gradient, k_gradient):
    wanted = ctx.needs_input_grad
    gradients = _qk_norm_rotary_backward(q_gradient, k_gradient, *ctx.saved_tensors, ctx.eps, wanted[2] or wanted[3])
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)), *(None,) * 5


_qk_norm_rotary.register_autograd(_backward, setup_context=_setup_context)
