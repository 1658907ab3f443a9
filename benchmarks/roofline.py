"""What the hardware allows: counted operations and bytes over the rates of a GPU.

The floor of a block or a step adds the time of matrix operations to that of the bytes, because the elementwise passes
lie between the matrix products and wait for them. A real run cannot reach it; a measured share of it says how much is
left.
"""

from __future__ import annotations

import math

from opensora_fast.costs.hardware import Gpu
from opensora_fast.costs.operations import Count, count_training_step
from opensora_fast.model import STDiT2Config

from .rows import Row
from .shapes import Workload

# Levels whose work is one kernel at best, in which reading and computing overlap.
SINGLE_KERNEL_LEVELS = ("copy", "gemm", "launch", "op")


def floor_tokens_per_s(config: STDiT2Config, workload: Workload, text: float, parameters: float, gpu: Gpu) -> float:
    """Tokens per second that a training step cannot exceed."""
    return workload.tokens / count_training_step(config, workload, text, parameters).seconds(gpu)


def floor_seconds(row: Row, gpu: Gpu) -> float:
    """What the counted operations and bytes of a row take at least; nan where none are counted."""
    count = Count(row.flops, row.bytes)
    if not (count.flops or count.bytes):
        return math.nan
    return count.seconds_overlapped(gpu) if row.level in SINGLE_KERNEL_LEVELS else count.seconds(gpu)


def project_ms(matrix_ms: float, memory_ms: float, measured_on: Gpu, target: Gpu) -> float:
    """A prediction for another GPU from measured parts; never to be shown without the word projection.

    Matrix-bound time is scaled by the matrix rates and memory-bound time by the bandwidths.

    Args:
        matrix_ms, memory_ms: measured on `measured_on`.
    """
    matrix = matrix_ms * measured_on.matrix_flops / target.matrix_flops
    return matrix + memory_ms * measured_on.bandwidth / target.bandwidth
