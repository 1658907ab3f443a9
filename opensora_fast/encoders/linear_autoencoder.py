"""A linear autoencoder that needs no download: every 8×8 patch of a frame to 4 numbers by principal components.

Fitted in seconds on the clips that it will encode. The latents have mean 0 and variance 1 over them, as the diffusion
expects. Pictures come back blurred (a patch keeps its color and its main gradient), but recognizable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from opensora_fast.pretrained import Need

from .vae import check_video, latent_size

PATCH = 8
CHANNELS = 4
PATCH_VALUES = 3 * PATCH * PATCH
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "linear_autoencoder.safetensors"
NEEDS = (Need("its configuration", (CONFIG_NAME,)), Need("its weights", (WEIGHTS_NAME,)))

# Variance below which a component is rounding noise of 8-bit video: dividing by it would only blow that up.
MIN_VARIANCE = 1e-6


def find_weights(source: str | Path | None) -> Path:
    """The folder that `LinearAutoencoder.save_pretrained` wrote. ValueError if there is none."""
    if not source:
        raise ValueError(
            "vae.from_pretrained is missing: a linear autoencoder is fitted on the data. `sample --ckpt-path RUN` "
            "takes that of a run of `train`; or fit one with LinearAutoencoder.fit(clips).save_pretrained(folder) "
            "and give that folder"
        )
    folder = Path(source).expanduser()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"vae.from_pretrained: {folder / name} is missing; give a folder that "
                f"LinearAutoencoder.save_pretrained wrote"
            )
    return folder


class LinearAutoencoder:
    """latent = (patch - mean) · components / std; decoding is the inverse within the 4 components.

    The arithmetic is float32 whatever `dtype` says; `dtype` is that of the results. Sizes that are no multiple of 8
    lose the remainder at the bottom and right.

    Args:
        mean: [192] of a patch, in the order (color, row, column), colors in [-1, 1].
        components: [4, 192], orthonormal rows.
        std: [4], standard deviation of each component over the fitted clips.
        explained_variance: share of the variance that the 4 components hold, for the record.
    """

    patch_size = (1, PATCH, PATCH)
    out_channels = CHANNELS

    def __init__(self, mean: Tensor, components: Tensor, std: Tensor, explained_variance: float):
        for name, tensor, shape in (
            ("mean", mean, (PATCH_VALUES,)),
            ("components", components, (CHANNELS, PATCH_VALUES)),
            ("std", std, (CHANNELS,)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"linear autoencoder: {name} must be {list(shape)}, got {list(tensor.shape)}")
        self.mean, self.components, self.std = mean.float(), components.float(), std.float()
        self.explained_variance = explained_variance
        self.dtype = torch.float32

    @classmethod
    def fit(cls, clips: Iterable[Tensor]) -> LinearAutoencoder:
        """Fits the components on clips, reading each once.

        Args:
            clips: [3, T, H, W] or [B, 3, T, H, W] floating in [-1, 1], as decoders give them.

        Raises:
            ValueError: no clip, a wrong shape, values that are not finite, or clips of one color only.
        """
        count = 0
        total = torch.zeros(PATCH_VALUES, dtype=torch.float64)
        products = torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
        for clip in clips:
            batch = clip[None] if clip.ndim == 4 else clip
            check_video(batch, cls.patch_size)
            patches = _to_patches(batch).flatten(0, 3).double().cpu()
            count += len(patches)
            total += patches.sum(0)
            products += patches.T @ patches
        if count == 0:
            raise ValueError("linear autoencoder: there is no clip to fit; check the data path")
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise ValueError("linear autoencoder: the clips hold values that are not finite")
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        variances, components = variances.flip(0).clamp(min=0), vectors.flip(1).T[:CHANNELS]
        if variances[0] < MIN_VARIANCE:
            raise ValueError("linear autoencoder: every patch of the clips is the same; there is nothing to encode")
        # A component is defined up to its sign: let its largest entry be positive.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return cls(
            mean=mean,
            components=components * largest.sign(),
            std=variances[:CHANNELS].clamp(min=MIN_VARIANCE).sqrt(),
            explained_variance=float(variances[:CHANNELS].sum() / variances.sum()),
        )

    @classmethod
    def from_pretrained(
        cls,
        from_pretrained: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LinearAutoencoder:
        """Loads a folder written by `save_pretrained`.

        Raises:
            ValueError: no such folder, or files that are missing or broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = find_weights(from_pretrained)
        try:
            explained_variance = float(json.loads((folder / CONFIG_NAME).read_text())["explained_variance"])
            tensors = load_file(folder / WEIGHTS_NAME)
            autoencoder = cls(**tensors, explained_variance=explained_variance)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"vae.from_pretrained: {folder} holds no linear autoencoder: {error}") from error
        return autoencoder.to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and linear_autoencoder.safetensors into `folder`, which is created."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "components": self.components, "std": self.std}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        config = {
            "type": "linear",
            "patch_size": self.patch_size,
            "out_channels": self.out_channels,
            "explained_variance": self.explained_variance,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LinearAutoencoder:
        """Moves it; `dtype` is that of the results from now on."""
        self.mean, self.components, self.std = (
            tensor.to(device) if device is not None else tensor for tensor in (self.mean, self.components, self.std)
        )
        self.dtype = dtype or self.dtype
        return self

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """(T, H, W) in frames and pixels to that of the latent, rounded down; None stays None."""
        return latent_size(input_size, self.patch_size)

    @torch.no_grad()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] to latents [B, 4, T, H // 8, W // 8]; nothing is drawn from `generator`."""
        check_video(video, self.patch_size)
        patches = _to_patches(video.to(self.device, torch.float32))
        latents = (patches - self.mean) @ (self.components / self.std[:, None]).T
        return latents.permute(0, 4, 1, 2, 3).contiguous().to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, T, h, w] to frames [B, 3, T, 8 h, 8 w], about [-1, 1], not clamped."""
        if latents.ndim != 5 or latents.shape[1] != CHANNELS:
            raise ValueError(f"latents must be [B, {CHANNELS}, T, h, w], got {list(latents.shape)}")
        latents = latents.to(self.device, torch.float32).permute(0, 2, 3, 4, 1)
        patches = latents @ (self.components * self.std[:, None]) + self.mean  # [B, T, h, w, 192]
        patches = patches.unflatten(-1, (3, PATCH, PATCH)).permute(0, 4, 1, 2, 5, 3, 6)  # [B, 3, T, h, 8, w, 8]
        return patches.flatten(5, 6).flatten(3, 4).contiguous().to(self.dtype)


def _to_patches(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] to [B, T, H // 8, W // 8, 192]."""
    height, width = (size // PATCH * PATCH for size in video.shape[3:])
    patches = video[..., :height, :width].unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, 3, T, h, 8, w, 8]
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
