"""Argument checks shared by the ops: each raises `ValueError` that names the op, the argument and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackLayout

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALLEST_EPSILON = 1e-30  # of the RMS norm: kernels compute its reciprocal, in float32, which ends at 1e38


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device | None
) -> None:
    """`shape` may hold None for a size that is free; a `device` of None stands for any."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if type(tensor) not in PLAIN_TYPES and hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{op}: {name} is a {type(tensor).__name__}; call the op inside the forward of the module that fully_shard "
            "was applied to, where its parameters are whole, or give full_tensor() or to_local()"
        )
    if tensor.shape != shape and not _fits(tensor.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the tokens are on {device}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def _fits(sizes: torch.Size, shape: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(shape):
        return False
    for size, expected in zip(sizes, shape, strict=True):
        if expected is not None and size != expected:
            return False
    return True


def check_tokens(op: str, name: str, tensor: Tensor, layout: PackLayout, *sizes: int | None) -> None:
    """Tokens of the pack: [N, *sizes]."""
    check_tensor(op, name, tensor, (layout.num_tokens, *sizes), layout.device)


def check_table(op: str, name: str, table: Tensor, length: int, layout: PackLayout, hint: str) -> None:
    """A table of numbers that kernels read as they lie in memory: int32 [length], contiguous."""
    if not isinstance(table, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(table).__name__}; {hint}")
    if table.shape != (length,) or table.dtype != torch.int32 or not table.is_contiguous():
        lies = "" if table.is_contiguous() else "not contiguous "
        raise ValueError(
            f"{op}: {name} is {lies}{table.dtype} {tuple(table.shape)}, expected contiguous int32 ({length},); {hint}"
        )
    if table.device != layout.device:
        raise ValueError(f"{op}: {name} is on {table.device}, but the layout is on {layout.device}")


def check_modulation(op: str, x: Tensor, layout: PackLayout, frame_rows: Tensor, **tables: Tensor | None) -> None:
    """x [N, C]; each table [R, C] with the same R, only `gate` may be None; frame_rows int32 [F].

    Reading the numbers in frame_rows would wait for the GPU, and kernels trust them. So they must be those of the
    layout: tables of B rows go with `frame_video`, which `modulation_rows` returns where no frame is given, and any
    others need the 2·B rows that they may point to.
    """
    check_tokens(op, "x", x, layout, None)
    if x.shape[1] < 2:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, expected at least 2")
    check_table(op, "frame_rows", frame_rows, layout.num_frames, layout, "use layout.modulation_rows(...)")
    rows = None
    for name, table in tables.items():
        if table is None and name == "gate":
            continue
        check_tensor(op, name, table, (rows, x.shape[1]), layout.device)
        rows = table.shape[0]
        if rows not in (layout.num_videos, 2 * layout.num_videos):
            raise ValueError(
                f"{op}: {name} has {rows} rows, expected {layout.num_videos} (one per video) or "
                f"{2 * layout.num_videos} (noised rows, then given rows)"
            )
    if rows == layout.num_videos and frame_rows is not layout.frame_video:
        raise ValueError(
            f"{op}: tables of {rows} rows go with layout.frame_video; these frame_rows may point to given rows, so the "
            f"tables need {2 * rows}"
        )


def check_qk_weights(
    op: str, q_weight: Tensor | None, k_weight: Tensor | None, head_size: int, layout: PackLayout
) -> None:
    """Weights of the QK-norm: both [D], or both None."""
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: give both q_weight and k_weight, or neither")
    if q_weight is not None and k_weight is not None:
        check_tensor(op, "q_weight", q_weight, (head_size,), layout.device)
        check_tensor(op, "k_weight", k_weight, (head_size,), layout.device)


def check_self_attention(
    op: str,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackLayout,
    qkv_bias: Tensor | None,
) -> None:
    """qkv [N, 3, H, D], the weights of the QK-norm, and the bias [3, H, D] or None."""
    check_tokens(op, "qkv", qkv, layout, 3, None, None)
    check_qk_weights(op, q_weight, k_weight, qkv.shape[3], layout)
    if qkv_bias is not None:
        check_tensor(op, "qkv_bias", qkv_bias, tuple(qkv.shape[1:]), layout.device)


def check_angles(op: str, cos: Tensor, sin: Tensor, head_size: int, layout: PackLayout) -> None:
    """Tables of the rotary embedding: cos and sin [at least the longest T, D/2]."""
    if head_size % 2:
        raise ValueError(f"{op}: an odd head size, {head_size}; rotary embedding turns pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, (None, head_size // 2), layout.device)
        if table.shape[0] < layout.max_frames:
            raise ValueError(f"{op}: {name} has {table.shape[0]} rows, but a video has {layout.max_frames} frames")


def check_head_size(op: str, head_size: int) -> None:
    """Head sizes that the Triton kernels of attention take."""
    if head_size % 8 or not 8 <= head_size <= 128:
        raise ValueError(
            f"{op}: head size {head_size} has no Triton kernel, a multiple of 8 up to 128 has; use backend='reference'"
        )


def check_epsilon(op: str, q_weight: Tensor | None, eps: float) -> None:
    """The Triton kernels norm rows of zeros beyond the end of a sequence, too; without weights they norm nothing."""
    if q_weight is not None and not eps >= SMALLEST_EPSILON:
        raise ValueError(
            f"{op}: eps {eps:g} has no Triton kernel, {SMALLEST_EPSILON:g} or more has; use backend='reference'"
        )


def check_reach(op: str, what: str, tokens: int, elements: int) -> None:
    """Kernels of attention count the elements of one sequence, `elements` for each of its `tokens`, with 32 bits."""
    if tokens * elements >= 2**31:
        raise ValueError(
            f"{op}: {what} of {tokens} tokens has no Triton kernel, up to {(2**31 - 1) // elements} have; "
            "use backend='reference'"
        )
