"""Model and diffusion of a configuration."""

import torch

from opensora_fast.config import TrainConfig
from opensora_fast.diffusion import IDDPM, build_scheduler
from opensora_fast.model import STDiT2, STDiT2Config


def make_model_config(
    config: TrainConfig, in_channels: int, caption_channels: int, model_max_length: int
) -> STDiT2Config:
    """The model's configuration; what the encoders decide is added. ValueError names a key that does not fit."""
    try:
        return STDiT2Config(
            **config.model.get_shape_keys(),
            in_channels=in_channels,
            caption_channels=caption_channels,
            model_max_length=model_max_length,
        )
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


def count_recomputed(blocks: bool | int, depth: int) -> int:
    """Blocks that recompute their activations, of `grad_checkpoint`; ValueError if the model has fewer."""
    if blocks > depth:
        raise ValueError(f"grad_checkpoint={blocks}, but the model has {depth} blocks: at most {depth}, or True")
    return depth if blocks is True else int(blocks)


def build_model(config: STDiT2Config, seed: int, grad_checkpoint: bool | int) -> STDiT2:
    """The model in float32 on the CPU, its initial weights drawn from the seed, in train mode."""
    torch.manual_seed(seed)
    model = STDiT2(config)
    model.set_checkpointing(count_recomputed(grad_checkpoint, config.depth))
    return model.train()


def build_diffusion(config: TrainConfig) -> IDDPM:
    """The diffusion that `scheduler` of a configuration names."""
    if config.scheduler.learn_sigma != config.model.pred_sigma:
        raise ValueError(
            f"scheduler.learn_sigma={config.scheduler.learn_sigma} and model.pred_sigma={config.model.pred_sigma} "
            "must be equal: the model gives the variance that the loss learns"
        )
    return build_scheduler(config.scheduler.get_keys())
