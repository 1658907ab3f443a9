"""Rows of modulation tables for tokens, in plain PyTorch: broadcast over the tokens of a frame, not gathered for each.

The gradient of a gathered row is summed over the tokens of a video in the dtype of the table, and each addition rounds:
in bfloat16 it is 9 % off for 6480 tokens. That of a row that is broadcast is a sum in float32, and takes one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackLayout


def token_rows(table: Tensor, frame_rows: Tensor, layout: PackLayout) -> Tensor:
    """The row [C] of `table` [R, C] that each token has: [N, C].

    Args:
        frame_rows: int32 [F], each frame's row.
    """
    # A frame's row is gathered in float32, so that the sum over the frames is one in float32, too.
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    frames = table.to(wide)[frame_rows].to(table.dtype)
    parts = []
    for run in layout.runs:
        rows = frames[run.first_frame : run.first_frame + run.videos * run.frames]
        parts.append(rows[:, None].expand(-1, run.frame_tokens, -1).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
