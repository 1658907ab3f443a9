"""The Stable Diffusion VAE (diffusers `AutoencoderKL`), applied to every frame by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from opensora_fast.pretrained import Need, find_folder, load_completely, locate_pretrained

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Latents are multiplied by this, whatever the VAE's own configuration says: the released ST-DiT-2 was trained so.
LATENT_SCALE = 0.18215
EXAMPLE = "stabilityai/sd-vae-ft-ema"
NEEDS = (
    Need("its configuration", ("config.json",)),
    Need("its weights", ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin")),
)


def find_weights(
    source: str | Path | None, cache_dir: str | None = None, local_files_only: bool = False
) -> Path | None:
    """The folder on this machine; None where it would be downloaded. ValueError if there is none, or files lack."""
    setting = "vae.from_pretrained"
    return find_folder("vae", setting, source, NEEDS, EXAMPLE, cache_dir, local_files_only)


class VideoAutoencoderKL(nn.Module):
    """Encodes and decodes videos frame by frame, `micro_batch_size` frames at a time (None: all at once).

    The device and dtype are those of the weights; inputs are brought to them micro-batch by micro-batch, so a long
    video may wait on the CPU. Sizes that are no multiple of 8 lose the remainder.

    Args:
        module: the VAE; it is frozen and set to eval mode.
        micro_batch_size: frames per call, at least 1; bounds the memory.
        latents: "sample" draws from the VAE's Gaussian, as the released model was trained; "mode" takes its mean, which
            is deterministic.
    """

    def __init__(
        self,
        module: AutoencoderKL,
        micro_batch_size: int | None = None,
        latents: Literal["sample", "mode"] = "sample",
    ):
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"vae.micro_batch_size must be at least 1 or None, got {micro_batch_size}")
        if latents not in ("sample", "mode"):
            raise ValueError(f"vae.latents must be 'sample' or 'mode', got {latents!r}")
        factor = 2 ** (len(module.config.block_out_channels) - 1)
        if factor != 8:
            raise ValueError(f"vae: this AutoencoderKL makes a frame {factor} times smaller; ST-DiT-2 needs 8 times")
        self.module = module.eval().requires_grad_(False)
        self.micro_batch_size = micro_batch_size
        self.latents = latents
        self.out_channels: int = module.config.latent_channels
        self.patch_size = (1, factor, factor)

    @classmethod
    def from_pretrained(
        cls,
        from_pretrained: str | Path | None = None,
        *,
        micro_batch_size: int | None = None,
        latents: Literal["sample", "mode"] = "sample",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VideoAutoencoderKL:
        """Loads a local folder or a hub id (see `locate_pretrained`); `dtype` float32 or bfloat16.

        Raises:
            ValueError: the weights are not there or do not load.
        """
        folder = locate_pretrained(
            "vae",
            from_pretrained,
            NEEDS,
            example=EXAMPLE,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        from diffusers import AutoencoderKL

        # .bin files are read with weights_only=True; low_cpu_mem_usage would need accelerate, for 0.3 GB of weights.
        module = load_completely("vae", AutoencoderKL, folder, local_files_only=True, low_cpu_mem_usage=False)
        return cls(module, micro_batch_size, latents).to(device, dtype)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """(T, H, W) in frames and pixels to that of the latent, rounded down; None stays None."""
        return latent_size(input_size, self.patch_size)

    @torch.no_grad()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of a video.

        Args:
            video: [B, 3, T, H, W] in [-1, 1], any device and dtype.
            generator: draws the latents of mode "sample", all at once, so that they do not depend on the micro-batch
                size; on the CPU it draws the same for every device. None: torch's own generator.

        Returns:
            [B, 4, T, H // 8, W // 8] of the VAE's device and dtype, times 0.18215.
        """
        check_video(video, self.patch_size)
        frames, clips = _to_frames(video), video.shape[0]
        count, (_, height, width) = len(frames), self.get_latent_size(video.shape[2:])
        noise = None
        if self.latents == "sample":
            noise = torch.randn(
                (count, self.out_channels, height, width),
                generator=generator,
                device=generator.device if generator is not None else self.device,
            )

        def encode_frames(start: int, stop: int) -> Tensor:
            gaussian = self.module.encode(frames[start:stop].to(self.device, self.dtype)).latent_dist
            if noise is None:
                return gaussian.mode() * LATENT_SCALE
            return (gaussian.mean + gaussian.std * noise[start:stop].to(self.device, self.dtype)) * LATENT_SCALE

        return _to_clips(self._in_micro_batches(encode_frames, count), clips)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, T, h, w] to frames [B, 3, T, 8 h, 8 w], about [-1, 1], not clamped."""
        if latents.ndim != 5 or latents.shape[1] != self.out_channels:
            raise ValueError(f"latents must be [B, {self.out_channels}, T, h, w], got {list(latents.shape)}")
        frames, clips = _to_frames(latents), latents.shape[0]

        def decode_frames(start: int, stop: int) -> Tensor:
            return self.module.decode(frames[start:stop].to(self.device, self.dtype) / LATENT_SCALE).sample

        return _to_clips(self._in_micro_batches(decode_frames, len(frames)), clips)

    def _in_micro_batches(self, call: Callable[[int, int], Tensor], count: int) -> Tensor:
        step = self.micro_batch_size or count
        parts = [call(start, min(start + step, count)) for start in range(0, count, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def latent_size(input_size: Sequence[int | None], patch_size: tuple[int, int, int]) -> list[int | None]:
    """Divides (T, H, W) by the patch size, rounding down; None stays None."""
    return [None if size is None else size // patch for size, patch in zip(input_size, patch_size, strict=True)]


def check_video(video: Tensor, patch_size: tuple[int, int, int]) -> None:
    """Raises ValueError unless `video` is a floating [B, 3, T, H, W] with at least one patch."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"a video to encode must be [B, 3, T, H, W], got {list(video.shape)}")
    if not video.is_floating_point():
        raise ValueError(f"a video to encode must be floating point in [-1, 1], got {video.dtype}")
    if any(size < patch for size, patch in zip(video.shape[2:], patch_size, strict=True)) or len(video) == 0:
        raise ValueError(f"a video of shape {list(video.shape)} holds no patch of (T, H, W) = {patch_size}")


def _to_frames(video: Tensor) -> Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def _to_clips(frames: Tensor, clips: int) -> Tensor:
    return frames.unflatten(0, (clips, -1)).transpose(1, 2).contiguous()
