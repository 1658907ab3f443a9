"""Operations and bytes of ST-DiT-2, counted.

Counting rules, per token of the residual stream (C hidden, S tokens of a frame, T frames, L text tokens, D layers):

- linear layers of a block: qkv and projection of two self-attentions 8·C², cross-attention's query and projection 2·C²,
  MLP 8·C² multiply-adds: 36·C² FLOP forward. Text keys and values: 4·C² FLOP per text token and block.
- attention: 4·C·length FLOP forward for each of the spatial (S), temporal (T) and cross (L) attention.
- backward costs twice the forward's useful operations; recomputed ones are not counted.
- bytes: a fused schedule moves 15 rows of C elements forward and 21 backward per token and block between the matrix
  products; optimizer and EMA move each parameter's state once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opensora_fast.costs.hardware import Gpu

if TYPE_CHECKING:
    from opensora_fast.model import STDiT2Config

FUSED_ROWS_FORWARD, FUSED_ROWS_BACKWARD = 15, 21
# Per parameter and step: fp32 master, two Adam moments and EMA read and written, gradient read, bf16 weight written.
OPTIMIZER_BYTES = 4 * (4 + 4) + 2 + 2


class Videos(Protocol):
    """Videos of one shape: their number, the frames of each, its tokens per frame, and the tokens of all."""

    @property
    def batch(self) -> int: ...

    @property
    def frames(self) -> int: ...

    @property
    def frame_tokens(self) -> int: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class VideoBatch:
    """`Videos` by their numbers alone."""

    batch: int
    frames: int
    frame_tokens: int

    @property
    def tokens(self) -> int:
        return self.batch * self.frames * self.frame_tokens


@dataclass(frozen=True)
class VideoShare:
    """What one process computes of `Videos` whose frames are shared out: so many tokens, in whole frames.

    Attributes:
        batch: videos of which it has frames.
        frames: of each of the shared videos, over which it attends.
    """

    batch: int
    frames: int
    frame_tokens: int
    tokens: int


def largest_share(videos: Videos, processes: int) -> Videos:
    """The largest share of videos of which each process computes about as many consecutive frames."""
    if processes == 1:
        return videos
    frames = -(-videos.batch * videos.frames // processes)
    touched = min(videos.batch, 1 + -(-(frames - 1) // videos.frames))
    return VideoShare(touched, videos.frames, videos.frame_tokens, frames * videos.frame_tokens)


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


def count_block(config: STDiT2Config, videos: Videos, text: float, element: int = 2) -> tuple[Count, Count]:
    """(forward, forward and backward) of one block.

    Args:
        text: real text tokens of each video, on average.
        element: bytes of an activation.
    """
    tokens, channels = videos.tokens, config.hidden_size
    per_token = linear_flops_per_token(config)
    per_token += attention_flops_per_token(config, videos.frame_tokens, videos.frames, text)
    flops = tokens * per_token / config.depth + videos.batch * text * 4.0 * channels**2
    row = tokens * channels * element
    forward = Count(flops, float(FUSED_ROWS_FORWARD * row))
    return forward, forward + Count(2 * flops, float(FUSED_ROWS_BACKWARD * row))


def count_forward(config: STDiT2Config, videos: Videos, text: float, element: int = 2) -> Count:
    """The whole model's forward.

    Args:
        text: real text tokens of each video, on average.
        element: bytes of an activation.
    """
    channels = config.hidden_size
    patch = config.patch_size[1] ** 2
    block, _ = count_block(config, videos, text, element)
    flops = block.flops * config.depth
    flops += videos.tokens * 2.0 * channels * patch * (config.in_channels + config.out_channels)
    flops += videos.batch * text * 2.0 * channels * (config.caption_channels + channels)
    return Count(flops, block.bytes * config.depth)


def count_training_step(
    config: STDiT2Config, videos: Videos, text: float, parameters: float, element: int = 2
) -> Count:
    """Forward, backward, optimizer and EMA; latents and text embeddings are there already."""
    forward = count_forward(config, videos, text, element)
    moved = videos.tokens * FUSED_ROWS_BACKWARD * config.hidden_size * element * config.depth
    return forward + Count(2 * forward.flops, moved) + count_optimizer(parameters)


def count_recomputation(config: STDiT2Config, videos: Videos, text: float, blocks: int, element: int = 2) -> Count:
    """What a training step does twice when so many blocks recompute their activations."""
    block, _ = count_block(config, videos, text, element)
    return Count(blocks * block.flops, blocks * block.bytes)


def count_optimizer(parameters: float) -> Count:
    """Optimizer and EMA of a step."""
    return Count(0.0, OPTIMIZER_BYTES * parameters)
