"""From a sampling configuration to a `VideoGenerator`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from opensora_fast.config import SampleConfig
from opensora_fast.cuda_graphs import refuse_without_gpu
from opensora_fast.data.reporting import print_line
from opensora_fast.device import DTYPES, choose_device
from opensora_fast.diffusion import build_scheduler
from opensora_fast.encoders import build_text_encoder, build_video_encoder, choose_text_dtype, get_model_keys
from opensora_fast.model import STDiT2, STDiT2Config
from opensora_fast.model.checkpoint_files import load_checkpoint_file, locate_checkpoint_file
from opensora_fast.model.pixart import convert_upstream_state_dict
from opensora_fast.model.weights import CONFIG_NAME, WEIGHTS_NAME, load_strictly, read_config
from opensora_fast.parallel.join import read_place
from opensora_fast.sampling.generate import SampleSettings, VideoGenerator
from opensora_fast.sampling.replayed_model import ReplayedModel


def build_generator(config: SampleConfig, device: torch.device | str | None = None) -> VideoGenerator:
    """Load the encoders and the model of a configuration and put them on the device.

    The text encoder runs in float32 (T5 overflows in less), the rest in the configuration's dtype.

    Args:
        config: a `SampleConfig`.
        device: the GPU where there is one, if None.

    Raises:
        ValueError: weights that are missing or do not fit, encoders that do not fit the model, or CUDA graphs without a
            GPU.
    """
    if config.scheduler.type == "iddpm-speed":
        raise ValueError('scheduler.type "iddpm-speed" only trains; sample with type="iddpm"')
    if config.scheduler.type == "dpm-solver" and config.loop > 1:
        raise ValueError(f'dpm-solver cannot go on from given frames, loop={config.loop}; use type="iddpm" or loop=1')
    if config.scheduler.num_sampling_steps is None and config.scheduler.timestep_respacing is None:
        raise ValueError("scheduler.num_sampling_steps is missing; 100 is Open-Sora's choice")
    device = choose_device(None) if device is None else torch.device(device)
    refuse_without_gpu(config.cuda_graph_tokens, device.type)
    dtype = DTYPES[config.dtype]
    path = locate_weights(config)  # before encoders, which may be tens of gigabytes to download
    scheduler = build_scheduler(config.scheduler.get_keys())
    video_encoder = build_video_encoder(config.vae.get_keys(), device, dtype)
    text_dtype = choose_text_dtype(config.text_encoder.shardformer, dtype)
    text_encoder = build_text_encoder(config.text_encoder.get_keys(), device, text_dtype)
    model = load_model(config, path, get_model_keys(video_encoder, text_encoder)).to(device, dtype).eval()
    replayed = ReplayedModel(model, config.cuda_graph_tokens) if config.cuda_graph_tokens else None
    return VideoGenerator(model, video_encoder, text_encoder, scheduler, make_settings(config), replayed)


def locate_weights(config: SampleConfig) -> Path:
    """The folder or file of `config.model.from_pretrained`. ValueError if there is none."""
    if config.model.from_pretrained is None:
        raise ValueError("there are no weights to sample from; give --ckpt-path or model.from_pretrained")
    return locate_checkpoint_file(config.model.from_pretrained, "--ckpt-path or model.from_pretrained")


def load_model(config: SampleConfig, path: Path, model_keys: dict[str, int]) -> STDiT2:
    """The model whose weights lie there, which must be of the `model_keys` of its encoders; keys given in the section
    `model` replace those of its config.json."""
    source = config.model.from_pretrained
    if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    if not (path / CONFIG_NAME).is_file():
        return load_model_file(config, path, model_keys)
    # Before the configuration: the one in a run that has no checkpoint yet is not of a model.
    state = load_checkpoint_file(path)
    saved = read_config(path)
    given = {key: value for key, value in config.model.get_shape_keys().items() if key in config.model.model_fields_set}
    for key, value in given.items():
        if value != getattr(saved, key) and read_place(os.environ).rank == 0:
            print_line(f"note: model.{key}={value!r} replaces {getattr(saved, key)!r}, with which {source} was trained")
    model_config = STDiT2Config(**(saved.model_dump() | given))
    for key, value in model_keys.items():
        if getattr(model_config, key) != value:
            owner = "vae" if key == "in_channels" else "text_encoder"
            raise ValueError(
                f"{source} was trained with {key}={getattr(model_config, key)}, but the {owner} of the configuration "
                f"gives {value}; use the {owner} that it was trained with"
            )
    model = STDiT2(model_config)
    load_strictly(model, state, source)
    return model


def load_model_file(config: SampleConfig, path: Path, model_keys: dict[str, int]) -> STDiT2:
    """The model of a file such as Open-Sora's `ema.pt`, or of a checkpoint folder of its trainer.

    They hold no configuration, so the model section gives it.
    """
    model = STDiT2(STDiT2Config(**config.model.get_shape_keys(), **model_keys))
    state, _ = convert_upstream_state_dict(load_checkpoint_file(path), model)
    load_strictly(model, state, path)
    return model


def make_settings(config: SampleConfig) -> SampleSettings:
    """The `SampleSettings` of a configuration."""
    return SampleSettings(
        num_frames=config.num_frames,
        image_size=config.image_size,
        fps=config.fps,
        frame_interval=config.frame_interval,
        loop=config.loop,
        condition_frame_length=config.condition_frame_length,
        num_sample=config.num_sample,
        batch_size=config.batch_size,
        seed=config.seed,
        first_index=config.start_index or 0,
        aspect_ratio_as_trained=config.aspect_ratio_as_trained,
    )
