"""What the hardware allows: operations and bytes of ST-DiT-2, counted, over the rates of a GPU.

Counting rules, per token of the residual stream (C hidden, S tokens of a frame, T frames, L text tokens, D layers):

- linear layers of a block: qkv and projection of two self-attentions 8·C², cross-attention's query and projection 2·C²,
  MLP 8·C² multiply-adds: 36·C² FLOP forward. Text keys and values: 4·C² FLOP per text token and block.
- attention: 4·C·length FLOP forward for each of the spatial (S), temporal (T) and cross (L) attention.
- backward costs twice the forward's useful operations; recomputed ones are not counted.
- bytes: a fused schedule moves 15 rows of C elements forward and 21 backward per token and block between the matrix
  products; optimizer and EMA move each parameter's state once.

The floor adds the time of matrix operations to that of the bytes, because the elementwise passes lie between the matrix
products and wait for them. A real run cannot reach it; a measured share of it says how much is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from opensora_fast.model import STDiT2Config

from .shapes import Workload

FUSED_ROWS_FORWARD, FUSED_ROWS_BACKWARD = 15, 21
# Per parameter and step: fp32 master, two Adam moments and EMA read and written, gradient read, bf16 weight written.
OPTIMIZER_BYTES = 4 * (4 + 4) + 2 + 2


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU. `source` says whether they are a datasheet's or measured.

    Attributes:
        matrix_flops: dense bf16 FLOP/s.
        bandwidth: bytes/s of device memory, read plus written.
    """

    name: str
    matrix_flops: float
    bandwidth: float
    source: str


# Dense bf16 rate and memory bandwidth of the SXM parts by their datasheets.
DATASHEETS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 2.039e12, "datasheet, 80 GB SXM"),
        Gpu("H100", 989.4e12, 3.35e12, "datasheet, SXM"),
        Gpu("H800", 989.4e12, 3.35e12, "datasheet, SXM"),
        Gpu("H200", 989.4e12, 4.8e12, "datasheet, SXM"),
        Gpu("B200", 2250e12, 8.0e12, "datasheet, SXM"),
    )
}


@dataclass(frozen=True)
class Count:
    """Operations and bytes of something; they add up."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, gpu: Gpu) -> float:
        """Time of matrix products and passes over memory that wait for each other."""
        return self.flops / gpu.matrix_flops + self.bytes / gpu.bandwidth

    def seconds_overlapped(self, gpu: Gpu) -> float:
        """Time of one kernel that reads and computes at once."""
        return max(self.flops / gpu.matrix_flops, self.bytes / gpu.bandwidth)


def linear_flops_per_token(config: STDiT2Config) -> float:
    """Forward FLOP per token of the linear layers of all blocks: 36·C²·depth for an MLP ratio of 4."""
    multiply_adds = (3 + 1) * 2 + 2 + 2 * config.mlp_ratio
    return 2.0 * multiply_adds * config.hidden_size**2 * config.depth


def attention_flops_per_token(config: STDiT2Config, frame_tokens: int, frames: int, text: float) -> float:
    """Forward FLOP per token of the three attentions of all blocks."""
    return 4.0 * config.hidden_size * (frame_tokens + frames + text) * config.depth


def count_block(config: STDiT2Config, workload: Workload, text: float, element: int = 2) -> tuple[Count, Count]:
    """(forward, forward and backward) of one block.

    Args:
        text: real text tokens of each video, on average.
        element: bytes of an activation.
    """
    tokens, channels = workload.tokens, config.hidden_size
    per_token = linear_flops_per_token(config)
    per_token += attention_flops_per_token(config, workload.frame_tokens, workload.frames, text)
    flops = tokens * per_token / config.depth + workload.batch * text * 4.0 * channels**2
    row = tokens * channels * element
    forward = Count(flops, float(FUSED_ROWS_FORWARD * row))
    return forward, forward + Count(2 * flops, float(FUSED_ROWS_BACKWARD * row))


def count_forward(config: STDiT2Config, workload: Workload, text: float, element: int = 2) -> Count:
    """The whole model's forward on one workload.

    Args:
        text: real text tokens of each video, on average.
        element: bytes of an activation.
    """
    channels = config.hidden_size
    patch = config.patch_size[1] ** 2
    block, _ = count_block(config, workload, text, element)
    flops = block.flops * config.depth
    flops += workload.tokens * 2.0 * channels * patch * (config.in_channels + config.out_channels)
    flops += workload.batch * text * 2.0 * channels * (config.caption_channels + channels)
    return Count(flops, block.bytes * config.depth)


def count_training_step(
    config: STDiT2Config, workload: Workload, text: float, parameters: float, element: int = 2
) -> Count:
    """Forward, backward, optimizer and EMA; latents and text embeddings are there already."""
    forward = count_forward(config, workload, text, element)
    moved = workload.tokens * FUSED_ROWS_BACKWARD * config.hidden_size * element * config.depth
    return forward + Count(2 * forward.flops, moved) + count_optimizer(parameters)


def count_optimizer(parameters: float) -> Count:
    """Optimizer and EMA of a step."""
    return Count(0.0, OPTIMIZER_BYTES * parameters)


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
