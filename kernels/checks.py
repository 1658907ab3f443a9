"""Argument checks shared by the ops: each raises `ValueError` that names the op, the argument and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackLayout

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """`shape` may hold None for a size that is free."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == len(shape) and all(
        expected is None or size == expected for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the tokens are on {device}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def check_tokens(op: str, name: str, tensor: Tensor, layout: PackLayout, *sizes: int | None) -> None:
    """Tokens of the pack: [N, *sizes]."""
    check_tensor(op, name, tensor, (layout.num_tokens, *sizes), layout.device)


def check_modulation(op: str, x: Tensor, layout: PackLayout, frame_rows: Tensor, **tables: Tensor | None) -> None:
    """x [N, C]; each table [R, C] with the same R; frame_rows int32 [F]."""
    check_tokens(op, "x", x, layout, None)
    if frame_rows.shape != (layout.num_frames,) or frame_rows.dtype != torch.int32:
        raise ValueError(
            f"{op}: frame_rows is {frame_rows.dtype} {tuple(frame_rows.shape)}, expected int32 ({layout.num_frames},); "
            "use layout.modulation_rows(...)"
        )
    if frame_rows.device != layout.device:
        raise ValueError(f"{op}: frame_rows is on {frame_rows.device}, but the layout is on {layout.device}")
    rows = None
    for name, table in tables.items():
        if table is None:
            continue
        check_tensor(op, name, table, (rows, x.shape[1]), layout.device)
        rows = table.shape[0]
        if rows not in (layout.num_videos, 2 * layout.num_videos):
            raise ValueError(
                f"{op}: {name} has {rows} rows, expected {layout.num_videos} (one per video) or "
                f"{2 * layout.num_videos} (noised rows, then given rows)"
            )
