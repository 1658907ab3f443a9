"""Encoders: videos to latents and captions to text embeddings, each behind one small interface.

`build_video_encoder` and `build_text_encoder` take the `vae = dict(type=...)` and `text_encoder = dict(type=...)` of an
Open-Sora configuration. Importing this package loads neither diffusers nor transformers; building one that needs them
does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from opensora_fast.pretrained import find_local, fingerprint_files
from opensora_fast.suggest import suggest

__all__ = [
    "TextEncoder",
    "TextEncoding",
    "VideoEncoder",
    "build_text_encoder",
    "build_video_encoder",
    "choose_text_dtype",
    "fingerprint_weights",
    "get_model_keys",
    "refuse_missing_weights",
]


class VideoEncoder(Protocol):
    """Frames to latents and back; frozen, no gradients."""

    out_channels: int  # channels of a latent: 4
    patch_size: tuple[int, int, int]  # (frames, rows, columns) of pixels to a latent pixel: (1, 8, 8)

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """(T, H, W) of a video to that of its latent, rounded down; None stays None."""
        ...

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] to latents [B, 4, T, H // 8, W // 8]; `generator` draws where there is chance."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, T, h, w] to [B, 3, T, 8 h, 8 w], about [-1, 1] (not clamped)."""
        ...

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VideoEncoder: ...


class TextEncoding(TypedDict):
    """`y` [B, 1, L, C] on the encoder's device, `mask` [B, L] int64 on the CPU (1 = a token of the text)."""

    y: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """Captions to embeddings; frozen, no gradients."""

    output_dim: int  # C
    model_max_length: int  # L, to which every text is padded or cut

    def encode(self, texts: Sequence[str]) -> TextEncoding: ...

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder: ...


def get_model_keys(video_encoder: VideoEncoder, text_encoder: TextEncoder) -> dict[str, int]:
    """The keys of a model's configuration that its encoders decide."""
    return {
        "in_channels": video_encoder.out_channels,
        "caption_channels": text_encoder.output_dim,
        "model_max_length": text_encoder.model_max_length,
    }


# Configuration type -> (module, class). The class's from_pretrained says which keys the configuration may hold.
VIDEO_ENCODERS = {
    "VideoAutoencoderKL": ("vae", "VideoAutoencoderKL"),
    "linear": ("linear_autoencoder", "LinearAutoencoder"),
}
TEXT_ENCODERS = {"t5": ("t5", "T5Encoder"), "bytes": ("byte_text", "ByteTextEncoder")}


def build_video_encoder(
    config: dict[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VideoEncoder:
    """Builds the encoder that `config` (an Open-Sora `vae` dict) describes.

    Types and their keys:
        VideoAutoencoderKL: from_pretrained, micro_batch_size=None, latents="sample", cache_dir=None,
            local_files_only=False
        linear: from_pretrained (a folder written by `LinearAutoencoder.save_pretrained`)

    Raises:
        ValueError: unknown type or key, or weights that are not there.
    """
    return _build("vae", config, VIDEO_ENCODERS, device, dtype)


def choose_text_dtype(shardformer: bool, dtype: torch.dtype) -> torch.dtype:
    """As Open-Sora: T5 computes in float32, whatever the model's dtype, unless `shardformer` asks for half precision.

    It rounds to float16 then, which overflows in T5 XXL outside of ColossalAI's layers; here the model's dtype is used.
    """
    return dtype if shardformer else torch.float32


def build_text_encoder(
    config: dict[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Builds the encoder that `config` (an Open-Sora `text_encoder` dict) describes.

    Types and their keys:
        t5: from_pretrained, model_max_length=120, shardformer=False (see `choose_text_dtype`), clean_captions=True,
            cache_dir=None, local_files_only=False
        bytes: model_max_length=120, output_dim=64, depth=2, seed=0, clean_captions=True

    Raises:
        ValueError: unknown type or key, or weights that are not there.
    """
    return _build("text_encoder", config, TEXT_ENCODERS, device, dtype)


def refuse_missing_weights(config: dict[str, Any]) -> None:
    """ValueError where the encoder of a configuration (as the builders take it) is read from files that are not there.
    A hub is not asked."""
    module_name, _ = (VIDEO_ENCODERS | TEXT_ENCODERS)[config["type"]]
    module = importlib.import_module(f"{__name__}.{module_name}")
    if hasattr(module, "find_weights"):
        where = {key: config[key] for key in ("cache_dir", "local_files_only") if key in config}
        module.find_weights(config.get("from_pretrained"), **where)


def fingerprint_weights(config: dict[str, Any]) -> str | None:
    """Of the files that the encoder of a configuration (as the builders take it) is read from; None if it is read from
    none, or they are not on this machine."""
    source = config.get("from_pretrained")
    if source is None:
        return None
    module_name, _ = (VIDEO_ENCODERS | TEXT_ENCODERS)[config["type"]]
    needs = importlib.import_module(f"{__name__}.{module_name}").NEEDS
    folder = find_local(source, needs, config.get("cache_dir"))
    return None if folder is None else fingerprint_files(folder, needs)


def _build(
    owner: str, config: dict[str, Any], known: dict[str, tuple[str, str]], device: Any, dtype: torch.dtype
) -> Any:
    if not isinstance(config, dict):
        raise ValueError(f"{owner} must be a dict(type=..., ...), got {type(config).__name__}")
    keys = dict(config)
    name = keys.pop("type", None)
    if name is None:
        raise ValueError(f"{owner}.type is missing; known types: {', '.join(known)}")
    if name not in known:
        raise ValueError(f"{owner}.type: unknown type {name!r}; {suggest(name, known)}")
    module_name, class_name = known[name]
    encoder_class = getattr(importlib.import_module(f"{__name__}.{module_name}"), class_name)
    allowed = [key for key in inspect.signature(encoder_class.from_pretrained).parameters if key not in BUILD_ARGUMENTS]
    for key in keys:
        if key not in allowed:
            raise ValueError(f"{owner}.{key}: unknown key of type {name!r}; {suggest(key, allowed)}")
    return encoder_class.from_pretrained(**keys, device=device, dtype=dtype)


BUILD_ARGUMENTS = ("device", "dtype")
