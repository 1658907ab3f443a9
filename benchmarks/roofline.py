"""What the hardware allows: counted operations and bytes of ST-DiT-2 over the rates of a GPU.

The floor adds the time of matrix operations to that of the bytes, because the elementwise passes lie between the matrix
products and wait for them. A real run cannot reach it; a measured share of it says how much is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from opensora_fast.costs.hardware import Gpu
from opensora_fast.costs.operations import count_forward, count_training_step
from opensora_fast.model import STDiT2Config

from .shapes import Workload


def floor_tokens_per_s(config: STDiT2Config, workload: Workload, text: float, parameters: float, gpu: Gpu) -> float:
    """Tokens per second that a training step cannot exceed."""
    return workload.tokens / count_training_step(config, workload, text, parameters).seconds(gpu)


def model_flops_utilization(
    config: STDiT2Config, workload: Workload, text: float, tokens_per_s: float, gpu: Gpu
) -> float:
    """3 × forward FLOP over the GPU's peak, as MFU is usually reported."""
    per_token = 3 * count_forward(config, workload, text).flops / workload.tokens
    return per_token * tokens_per_s / gpu.matrix_flops


@dataclass(frozen=True)
class Projection:
    """A prediction for another GPU from measured parts; never to be shown without the word projection."""

    milliseconds: float
    label: str


def project(matrix_ms: float, memory_ms: float, measured_on: Gpu, target: Gpu) -> Projection:
    """Scales measured matrix-bound time by the matrix rates and memory-bound time by the bandwidths.

    Args:
        matrix_ms, memory_ms: measured on `measured_on`.
    """
    scaled = matrix_ms * measured_on.matrix_flops / target.matrix_flops
    scaled += memory_ms * measured_on.bandwidth / target.bandwidth
    return Projection(scaled, f"projection for {target.name} from a measurement on {measured_on.name}")
