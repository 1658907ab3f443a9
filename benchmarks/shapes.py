"""The named workloads that every suite measures: Open-Sora 1.1's resolutions, image sizes, frame counts and buckets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from opensora_fast.data.buckets.explain import LATENT_STRIDE
from opensora_fast.kernels import token_grid

# 16:9 sizes (height, width) in pixels of the five video resolutions, and the square image sizes.
VIDEO_SIZES = {"144p": (144, 256), "240p": (240, 426), "360p": (360, 640), "480p": (480, 854), "720p": (720, 1280)}
IMAGE_SIZES = {"256": (256, 256), "512": (512, 512), "1024": (1024, 1024)}
SIZES = VIDEO_SIZES | IMAGE_SIZES
PATCH = 2
WIDE = "wide norm weights"  # behind the name of a workload: the softmax needs its running maximum


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
        return self.frames, height // LATENT_STRIDE, width // LATENT_STRIDE

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


@dataclass(frozen=True)
class Pack:
    """The videos of one step: of one shape, or mixed.

    Attributes:
        name: for rows.
        parts: videos of one shape each, in the order of the pack.
    """

    name: str
    parts: tuple[Workload, ...]

    @staticmethod
    def of(workload: Workload) -> Pack:
        return Pack(workload.name, (workload,))

    @property
    def is_uniform(self) -> bool:
        return len(self.parts) == 1

    @property
    def videos(self) -> list[Workload]:
        """Each video as a workload of batch 1."""
        return [Workload(part.resolution, part.frames) for part in self.parts for _ in range(part.batch)]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(T, H, W) in tokens of each video."""
        return [video.grid for video in self.videos]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def text(self) -> str:
        """Sizes for a row: "B=5 T=16 S=405", of every part."""
        return " + ".join(f"B={part.batch} T={part.frames} S={part.frame_tokens}" for part in self.parts)

    def shortened(self, tokens: int) -> Pack:
        """The same kinds of videos, fewer and with fewer frames, of about `tokens` tokens, for checks in float64.

        Frames keep their size. Videos of several frames keep at least two, and there are two videos where that fits.
        """
        share = tokens / self.tokens
        if share >= 1:
            return self
        parts = []
        for part in self.parts:
            most = max(int(tokens / len(self.parts) / part.frame_tokens), 1)  # frames of all its videos
            batch = min(part.batch, 2, most)
            frames = max(min(part.frames, most // batch), min(part.frames, 2))
            parts.append(Workload(part.resolution, frames, batch))
        if tuple(parts) == self.parts:
            return self
        return Pack(" + ".join(f"{part.name} B={part.batch}" for part in parts), tuple(parts))

    def uniform_parts(self, tokens: int) -> list[Workload]:
        """For each part: videos of its shape, of about `tokens` tokens."""
        return [fill(part.resolution, part.frames, tokens) for part in self.parts]


@lru_cache(maxsize=8)
def stage_buckets(configuration: str) -> tuple[Workload, ...]:
    """The buckets of a shipped training configuration ("stage1", "stage2", "stage3") with their batch sizes.

    Aspect ratio 16:9 for videos and 1:1 for images; buckets that take no clip, and resolutions that are not in SIZES,
    are left out.
    """
    from opensora_fast.config import load_train_config
    from opensora_fast.train.locate_config import locate_config

    table = load_train_config(locate_config(configuration)).config.bucket_config
    return tuple(
        Workload(resolution, frames, batch)
        for resolution, entries in table.items()
        for frames, (_, batch) in entries.items()
        if batch and resolution in SIZES
    )


def text_lengths(videos: int, mean: int) -> list[int]:
    """Tokens of each video's caption: the mean, a fifth less and a fifth more in turn."""
    spread = mean // 5
    return [mean + spread * (video % 3 - 1) if videos > 1 else mean for video in range(videos)]
