"""Memory of a training step on one GPU, counted.

What stays: weights, their float32 masters, two Adam moments and the average; of W processes each holds 1/W of the last
four (ZeRO stage 1). What comes and goes: what the ops keep for backward, and gradients: one process makes a flat copy
of them behind backward; of several each copies and frees them while backward goes on, and sums 1/W of them beside. Per
token and block, in rows of C elements (r = MLP ratio), with the Triton ops:

    4    residual stream behind each of the four sublayers
    3    inputs of both qkv Linears and of the MLP
    6+1  queries, keys and values of both self-attentions; queries of cross-attention
    3    outputs of the three attentions, which are inputs of their projections
    3    branches in front of their gates: space, time, MLP (cross-attention has no gate)
    2·r  MLP before and after GELU; r where quack multiplies, which keeps what is before it alone

28 rows for r = 4 (24 with quack), and besides in float32 the sums of softmax, the factors of QK-norm and the moments of
the norms. Text adds its keys and values, 2 rows per text token and block, and each video its modulation, 9 rows per
block, twice where frames may be given. A recomputed block keeps the residual stream and the modulation; all else comes
back when backward reaches it. The modulation of all blocks is one tensor, which is there until backward is through the
first of them.
`tests/costs/test_memory.py` holds the count to what autograd saves and to the allocations of a whole step.

Where small steps are replayed as CUDA graphs (see `opensora_fast.train.step.graphs`), what the largest of them needs is
held in a pool, beside what other steps allocate, and so are a set of gradients and, for each graph, a copy of its
inputs.

Not counted: what encoders need while they encode, the few numbers per token that the loss keeps, what CUDA's driver
keeps of each graph, and, where processes share a micro-batch of videos too long for one tile of temporal attention, its
output before they exchange it: a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opensora_fast.costs.operations import VideoBatch, Videos, largest_share

if TYPE_CHECKING:
    from opensora_fast.model import STDiT2Config

FLOAT = 4
# Elements that describe a scalar condition.
SINUSOIDS = 256
# Gradients that backward holds at its worst moment, in rows; seen in the allocations of a step, see the test.
BACKWARD_ROWS = 3
# Share of a GPU's memory that nothing is planned for: CUDA's context, buffers of cuBLAS and NCCL, and gaps that the
# allocator cannot use. Assumed.
RESERVE = 0.06
LARGEST_BATCH = 4096


def usable_memory(memory: int) -> int:
    """Bytes of a GPU's memory without the reserve."""
    return int(memory * (1 - RESERVE))


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: all, the trained ones, and the trained ones of one block (the mean)."""

    parameters: int
    trained: int
    trained_in_block: int


@dataclass(frozen=True)
class MemoryModel:
    """Counts the memory of a process.

    Attributes:
        config: of the model.
        size: its parameters.
        text: tokens of each caption.
        element: bytes of a weight and of an activation, 2 (bfloat16) or 4 (float32).
        processes: that share the optimizer's state.
        sharing: processes that compute each micro-batch together, each some of its frames.
        encoders: bytes of the encoders' weights on the GPU.
        given_frames: whether some frames may be given (masks in training): they have a modulation of their own.
        graphed: the largest micro-batch whose step is replayed as a CUDA graph; None if none is.
        graphed_inputs: bytes of the copies of `inputs` that all graphs together may hold.
        linear: what multiplies in the Linears on all tokens, "torch" or "quack".
        activation_factor: measured over counted peak of activations; 1 where nothing was measured.
    """

    config: STDiT2Config
    size: ModelSize
    text: int
    element: int = 2
    processes: int = 1
    sharing: int = 1
    encoders: int = 0
    given_frames: bool = False
    graphed: Videos | None = None
    graphed_inputs: int = 0
    linear: str = "torch"
    activation_factor: float = 1.0

    @property
    def weights(self) -> int:
        """Bytes of the working weights."""
        return self.element * self.size.parameters

    @property
    def optimizer(self) -> int:
        """Bytes of masters (in float32 the weights of one process are their own), moments and average: of several, this
        process's share."""
        copies = 3 if self.element == FLOAT and self.processes == 1 else 4
        return FLOAT * copies * self.size.trained // self.processes

    @property
    def standing(self) -> int:
        """Bytes held from the first step to the last."""
        return self.weights + self.optimizer + self.encoders

    def stream(self, videos: Videos) -> int:
        """Bytes of the residual stream."""
        return videos.tokens * self.config.hidden_size * self.element

    def modulation(self, videos: Videos) -> int:
        """Bytes of the tables of one block: shift, scale and gate of space, time and MLP."""
        return videos.batch * 9 * self.config.hidden_size * self.element * (1 + self.given_frames)

    def saved_by_block(self, videos: Videos) -> int:
        """Bytes that one block keeps for backward."""
        config, element = self.config, self.element
        channels = config.hidden_size
        rows = 4 + 3 + 7 + 3 + 3 + (1 if self.linear == "quack" else 2) * config.mlp_ratio
        # Spatial attention: one number per token and head for q, k and softmax each; cross-attention: one; three norms:
        # two per token.
        in_float32 = FLOAT * (4 * config.num_heads + 6)
        per_token = rows * channels * element + in_float32
        text = videos.batch * self.text * 2 * channels * element
        return int(videos.tokens * per_token + text + self.modulation(videos))

    def saved_outside(self, videos: Videos) -> int:
        """Bytes that the rest of the model keeps for backward: patches, position, final layer, captions, conditions."""
        config, element, given = self.config, self.element, self.given_frames
        channels = config.hidden_size
        patch = config.in_channels * config.patch_size[1] ** 2
        # Given frames pass a second norm of the final layer, and a bool says which they are.
        per_token = ((2 + given) * channels + patch) * element + (1 + given) * 2 * FLOAT + given
        per_text = (config.caption_channels + 3 * channels) * element
        # Timestep, height, width, aspect ratio, frames and frame rate as sinusoids; what the Linears of their embedders
        # and of the modulation keep, and the final layer's tables. Given frames have a timestep of their own.
        per_video = ((14 + 8 * given) * channels + (6 + given) * SINUSOIDS) * element
        return int(videos.tokens * per_token + videos.batch * (self.text * per_text + per_video))

    def inputs(self, videos: Videos) -> int:
        """Bytes of latents and text embeddings as the trainer holds them, in float32."""
        config = self.config
        latents = videos.tokens * config.in_channels * config.patch_size[1] ** 2
        return FLOAT * (latents + videos.batch * self.text * config.caption_channels)

    def activations(self, videos: Videos, recomputed: int) -> int:
        """Most bytes that a step needs beside what stands: at the worst moment of backward, or in the optimizer.

        Args:
            recomputed: the first so many blocks recompute.
        """
        depth = self.config.depth
        share = largest_share(videos, self.sharing)
        stream, tables = self.stream(share), self.modulation(share)
        saved = self.saved_by_block(share) - tables
        # Where quack multiplies, the MLP makes the GELU's output again while backward is in it.
        rows = BACKWARD_ROWS + (self.config.mlp_ratio if self.linear == "quack" else 0)
        # The gradient of the MLP's second weight is made transposed first.
        transposed = int(self.element * self.config.mlp_ratio * self.config.hidden_size**2)
        always = self.inputs(videos) + self.saved_outside(share) + depth * tables + int(rows * stream) + transposed

        def at(block: int) -> int:
            """While backward is in this block."""
            stored = min(block + 1, recomputed) * stream + max(block + 1 - recomputed, 0) * saved
            again = saved - stream if block < recomputed else 0
            gradients = (self.element * self.size.trained_in_block + tables) * (depth - 1 - block)
            return int(self.activation_factor * (always + stored + again)) + gradients

        # Between these blocks memory rises or falls steadily.
        worst = max(at(block) for block in {0, recomputed - 1, min(recomputed, depth - 1), depth - 1} if block >= 0)
        gathered = self.element * self.size.trained  # gradients; beside them their copy, or the sums of a shard
        return max(worst, gathered + gathered // self.processes)

    def graphs(self, recomputed: int) -> int:
        """Bytes that CUDA graphs hold: their pool, the gradients that they write, and the inputs that they read."""
        if self.graphed is None:
            return 0
        return self.activations(self.graphed, recomputed) + self.element * self.size.trained + self.graphed_inputs

    def peak(self, videos: Videos, recomputed: int) -> int:
        """Most bytes that a training step needs."""
        return self.standing + self.graphs(recomputed) + self.activations(videos, recomputed)

    def largest_batch(self, videos: Videos, recomputed: int, memory: int) -> int:
        """How many videos of this shape fit into so many bytes; 0 if not one does. At most `LARGEST_BATCH`."""
        fits, too_many = 0, LARGEST_BATCH + 1
        while too_many - fits > 1:
            batch = (fits + too_many) // 2
            if self.peak(VideoBatch(batch, videos.frames, videos.frame_tokens), recomputed) <= memory:
                fits = batch
            else:
                too_many = batch
        return fits

    def fewest_recomputed(self, videos: Videos, memory: int) -> int | None:
        """The smallest number of recomputed blocks with which the videos fit into so many bytes; None if none does."""
        numbers = range(self.config.depth + 1)
        return next((number for number in numbers if self.peak(videos, number) <= memory), None)
