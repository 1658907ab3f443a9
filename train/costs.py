"""What the micro-batches of a configuration cost: operations, bytes and memory of each bucket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from opensora_fast.config import TrainConfig
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.memory import MemoryModel, ModelSize
from opensora_fast.costs.operations import (
    Count,
    VideoBatch,
    count_optimizer,
    count_recomputation,
    count_training_step,
    largest_share,
)
from opensora_fast.data.buckets.bucket import Bucket, BucketId, FrameEntry, ResolutionEntry
from opensora_fast.data.buckets.explain import count_tokens
from opensora_fast.device import DTYPES
from opensora_fast.encoders import choose_text_dtype
from opensora_fast.model import STDiT2, STDiT2Config
from opensora_fast.train.parts import count_recomputed, make_model_config
from opensora_fast.train.step.graphs import MOST_SHAPES

LATENT_CHANNELS = 4  # of both autoencoders
T5_WIDTH = 4096
# Parameters of the encoders that the published configurations name (a test builds both).
T5_XXL, T5_XXL_PARAMETERS = "t5-v1_1-xxl", 4_762_310_656
SD_VAE, SD_VAE_PARAMETERS = "sd-vae-ft", 83_653_863
# Orders of micro-batches must be the same on every machine, so their costs are counted at the rates of one GPU.
ORDERED_FOR = DATASHEETS["H800"]


@dataclass(frozen=True)
class RunCosts:
    """Costs of a configuration's buckets.

    Args:
        config: the configuration.
        bucket: its buckets.
        linear: what multiplies in the Linears on all tokens, "torch" or "quack"; times are counted for "torch".
    """

    config: TrainConfig
    bucket: Bucket
    linear: str = "torch"

    @cached_property
    def model(self) -> STDiT2Config:
        """The model, with the channels that the configured encoders give."""
        text = self.config.text_encoder
        channels = T5_WIDTH if text.type == "t5" else text.output_dim
        return make_model_config(self.config, LATENT_CHANNELS, channels, text.model_max_length)

    @cached_property
    def size(self) -> ModelSize:
        """Its parameters, counted on a model without memory."""
        with torch.device("meta"):
            model = STDiT2(self.model)
        trained = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
        in_blocks = _count(parameter for parameter in model.blocks.parameters() if parameter.requires_grad)
        return ModelSize(_count(model.parameters()), trained, in_blocks // self.model.depth)

    @property
    def text(self) -> int:
        """Tokens of a caption: all that it may have. Only real ones cost anything; how many those are is not known."""
        return self.config.text_encoder.model_max_length

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return DTYPES[self.config.dtype].itemsize

    @property
    def recomputed(self) -> int:
        """Blocks that recompute their activations; ValueError if the model has fewer, as training would raise."""
        return count_recomputed(self.config.grad_checkpoint, self.model.depth)

    def get_videos(self, bucket_id: BucketId) -> VideoBatch:
        """A micro-batch of a bucket."""
        frames, height, width = self.bucket.get_thw(bucket_id)
        frame_tokens = count_tokens(1, height, width, self.model.patch_size[1])
        return VideoBatch(self.bucket.get_batch_size(bucket_id) or 0, frames, frame_tokens)

    def get_largest(self, resolution: ResolutionEntry, entry: FrameEntry) -> BucketId:
        """Of the aspect ratios of a (resolution, frames) pair the one with the most tokens."""
        ids = [(resolution.name, entry.frames, ratio) for ratio in resolution.table.names]
        return max(ids, key=lambda bucket_id: self.get_videos(bucket_id).frame_tokens)

    def count_step(self, videos: VideoBatch, world_size: int) -> Count:
        """A training step of one process on a micro-batch, or its share of it, recomputed blocks included."""
        share = largest_share(videos, self.config.sp_size)
        step = count_training_step(self.model, share, self.text, 0.0, self.element)
        step += count_recomputation(self.model, share, self.text, self.recomputed, self.element)
        return step + count_optimizer(self.size.trained / world_size)

    def get_order_costs(self) -> np.ndarray:
        """Costs [buckets] for `balance=True`: the same on every machine, whatever is recomputed.

        In seconds of a GPU's datasheet; optimizer left out, as it is the same for all.
        """
        steps = [
            count_training_step(self.model, self.get_videos(bucket_id), self.text, 0.0) for bucket_id in self.bucket.ids
        ]
        return np.array([step.seconds(ORDERED_FOR) for step in steps])

    def get_memory_model(self, world_size: int) -> MemoryModel:
        """Counts the memory of one of `world_size` processes."""
        model = MemoryModel(
            config=self.model,
            size=self.size,
            text=self.text,
            element=self.element,
            processes=world_size,
            sharing=self.config.sp_size,
            encoders=sum(self._list_encoders().values()),
            given_frames=self.config.mask_ratios is not None,
            linear=self.linear,
        )
        limit = self.config.cuda_graph_tokens
        replayed = [videos for videos in map(self.get_videos, self.bucket.ids) if 0 < videos.tokens <= limit]
        largest = max(replayed, key=lambda videos: model.activations(videos, self.recomputed), default=None)
        # Each graph has its own inputs, and steps with given frames have graphs of their own.
        masked = self.config.mask_ratios is not None
        inputs = [model.inputs(videos) for videos in replayed for _ in range(1 + (masked and videos.frames > 1))]
        return replace(model, graphed=largest, graphed_inputs=sum(sorted(inputs)[-MOST_SHAPES:]))

    def _list_encoders(self) -> dict[str, int]:
        """Bytes of the weights of each encoder that stays on the GPU, as far as their size is known."""
        config = self.config
        if config.features is not None:
            return {}
        sizes = {}
        if config.vae.type == "VideoAutoencoderKL" and SD_VAE in (config.vae.from_pretrained or ""):
            sizes["the VAE"] = SD_VAE_PARAMETERS * self.element
        if T5_XXL in (config.text_encoder.from_pretrained or ""):
            dtype = choose_text_dtype(config.text_encoder.shardformer, DTYPES[config.dtype])
            sizes["T5"] = T5_XXL_PARAMETERS * dtype.itemsize
        return sizes

    def describe_encoders(self) -> str:
        """What of the encoders is in the memory that is counted, and what is not."""
        if self.config.features is not None:
            return "no encoders: latents and text come from features"
        known = self._list_encoders()
        parts = [f"weights of {name}" for name in known]
        counted = f"{' and '.join(parts)} counted; " if parts else "their weights not counted; "
        return f"encoders: {counted}not counted: what they need while they encode (features=FOLDER spares it all)"


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
