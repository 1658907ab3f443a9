"""What was expected of a GPU before anything was measured on it. A prediction stands beside a row; it never is one.

For an H200 targets for this project's kernels ("good" and "goal"), counted or estimated figures for the others. An H100
has the same multiprocessors: what is a share of the memory's bandwidth or a matrix rate is expected of it too, and of
its steps what the rows of an H200 project (`h100_steps.csv`, from `predictions.steps`).
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from opensora_fast.costs.hardware import recognize_gpu

from ..measuring.contest import FORWARD, FORWARD_BACKWARD
from ..rows import Row
from ..shapes import VIDEO_SIZES, WIDE

TARGETS_FOR = "H200"
PREDICTED_FOR = (TARGETS_FOR, "H100")
# Columns of predicted steps.
PROJECTED_LOW, PROJECTED_HIGH = (f"k tokens/s projected from an {TARGETS_FOR}, {end}" for end in ("low", "high"))

RESOLUTIONS = tuple(VIDEO_SIZES)
# Useful TFLOP/s of spatial attention at head size 72, by tokens of a frame.
FRAME_TOKENS = (144, 405, 920, 1590, 3600)
SPATIAL_FORWARD = ((150, 260, 330, 370, 390), (230, 360, 430, 480, 510))
SPATIAL_BACKWARD = ((150, 200, 240, 260, 270), (230, 290, 330, 350, 370))
HEAD_SIZE = 72
# How many times as fast a softmax without running maximum is; the rates above are those of one without.
BOUNDED_GAIN = (1.05, 1.14)
# Shares of the copy bandwidth.
TEMPORAL = {FORWARD: (0.80, 0.90), FORWARD_BACKWARD: (12 / (4 / 0.80 + 8 / 0.75), 12 / (4 / 0.90 + 8 / 0.85))}
NORMS = (0.85, 0.92)
NORM_OPS = ("modulated_norm", "gate_residual", "gate_residual_modulated_norm")
# An optimizer step, whose bytes are 38 of the 42 that ours moves: it gathers the gradients first.
ADAMW = tuple(38 / 42 * share for share in NORMS)
# TFLOP/s of cuBLAS.
PRODUCTS = {"qkv": (650, 700), "fc1": (650, 700), "proj": (600, 660), "fc2": (690, 740), "square": (790, 790)}
# Thousand tokens/s of a training step of 16 frames, by resolution.
STEPS = {
    "upstream": ((34, 33, 32, 31, 27),),
    "compile": ((93, 84, 81, 75, 57),),
    "ours": ((121, 115, 106, 96, 74), (141, 135, 125, 115, 92)),
}
FEWEST_TOKENS = 16384  # of a step: smaller ones wait for the host, of which nothing is predicted
LAUNCH = (5.0, 10.0)  # µs of a registered op


def predict(row: Row) -> str:
    """What was expected of a row, "" where nothing was."""
    gpu = recognize_gpu(row.environment.device_name) if row.environment else None
    return predict_for(row, gpu.name) if gpu else ""


def predict_for(row: Row, gpu: str) -> str:
    """What is expected of a row on a GPU such as "H200", "" where nothing is."""
    if gpu not in PREDICTED_FOR:
        return ""
    if row.level == "op" and row.provider == "ours":
        return _predict_op(row)
    if row.level == "gemm" and row.op in PRODUCTS and row.provider == "cublas":
        return _span(PRODUCTS[row.op], "TFLOP/s")
    if row.level == "launch" and row.provider == "ours-op":
        return _span(LAUNCH, "µs")
    resolution, _, frames = row.workload.partition("×")
    is_step = row.level == "step" and row.op in ("", "sustained") and row.tokens >= FEWEST_TOKENS
    if is_step and gpu != TARGETS_FOR:
        return _read_projected(gpu).get(row.workload, "") if row.provider == "ours" else ""
    if is_step and row.provider in STEPS and resolution in RESOLUTIONS and frames == "16":
        index = RESOLUTIONS.index(resolution)
        return _span([values[index] for values in STEPS[row.provider]], "k tokens/s")
    return ""


@lru_cache(maxsize=4)
def _read_projected(gpu: str) -> dict[str, str]:
    """Workload → what the rows of an H200 project for our step on another GPU."""
    path = Path(__file__).with_name(f"{gpu.lower()}_steps.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[PROJECTED_LOW]]
    return {
        row["workload"]: _span((float(row[PROJECTED_LOW]), float(row[PROJECTED_HIGH])), "k tokens/s") for row in rows
    }


def _predict_op(row: Row) -> str:
    if row.op in NORM_OPS:
        return _span([100 * share for share in NORMS], "% of copy")
    if row.op == "adamw":
        return _span([100 * share for share in ADAMW], "% of copy")
    if row.op == "temporal_attention" and row.direction in TEMPORAL:
        return _span([100 * share for share in TEMPORAL[row.direction]], "% of copy")
    if row.op != "spatial_attention":
        return ""
    length = next((part.split("=")[1] for part in row.shape.split() if part.startswith(("S=", "length="))), "")
    if not length.isdigit() or int(length) not in FRAME_TOKENS or f"D={HEAD_SIZE}" not in row.shape.split():
        return ""
    index = FRAME_TOKENS.index(int(length))
    forward, backward = ([values[index] for values in table] for table in (SPATIAL_FORWARD, SPATIAL_BACKWARD))
    if row.workload.endswith(WIDE):
        forward, backward = (
            [rate / gain for rate, gain in zip(rates, reversed(BOUNDED_GAIN), strict=True)]
            for rates in (forward, backward)
        )
    if row.direction == FORWARD:
        return _span(forward, "TFLOP/s")
    # Backward has 2.5 times the operations of forward.
    return _span([3.5 / (1 / f + 2.5 / b) for f, b in zip(forward, backward, strict=True)], "TFLOP/s")


def _span(values, unit: str) -> str:
    low, high = values[0], values[-1]
    return f"{low:.0f} {unit}" if low == high else f"{low:.0f}–{high:.0f} {unit}"
