"""The named workloads that every suite measures: Open-Sora 1.1's resolutions, image sizes, frame counts and buckets."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_fast.kernels import token_grid

# 16:9 sizes (height, width) in pixels of the five video resolutions, and the square image sizes.
VIDEO_SIZES = {"144p": (144, 256), "240p": (240, 426), "360p": (360, 640), "480p": (480, 854), "720p": (720, 1280)}
IMAGE_SIZES = {"256": (256, 256), "512": (512, 512), "1024": (1024, 1024)}
SIZES = VIDEO_SIZES | IMAGE_SIZES
FRAME_COUNTS = (1, 16, 32, 64, 128)
LATENT_SCALE = 8  # the VAE's, floor division as upstream
PATCH = 2


@dataclass(frozen=True)
class Workload:
    """Videos of one shape.

    Attributes:
        resolution: a key of `SIZES`.
        frames: of each video.
        batch: videos.
    """

    resolution: str
    frames: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.resolution}×{self.frames}"

    @property
    def pixels(self) -> tuple[int, int]:
        return SIZES[self.resolution]

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, height, width) of the latents."""
        height, width = self.pixels
        return self.frames, height // LATENT_SCALE, width // LATENT_SCALE

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W) in tokens."""
        return token_grid(*self.latent, PATCH)

    @property
    def frame_tokens(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.batch * self.frames * self.frame_tokens


def fill(resolution: str, frames: int, tokens: int) -> Workload:
    """The workload of about `tokens` tokens, at least one video."""
    one = Workload(resolution, frames)
    return Workload(resolution, frames, max(tokens // one.tokens, 1))
