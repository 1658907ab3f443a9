"""What the loaders hand to the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opensora_fast.data.buckets.bucket import BucketId
from opensora_fast.data.decoding.clips import is_image_path
from opensora_fast.data.manifest import IMAGE_FPS, Clip


@dataclass
class Batch:
    """One micro-batch: clips of one bucket with what the model is told about them.

    Either `video` is set, or, from cached features, `latents`, `text_embeddings` and `text_mask`. The conditions are
    float32 [B] on the CPU.

    Attributes:
        video: float32 [B, 3, T, H, W] in [-1, 1].
        text: B captions.
        num_frames: frames of the clip, T.
        height, width: pixels of the bucket.
        ar: width / height.
        fps: frames per second of the file, 120 for an image.
        bucket: (resolution, frames, aspect ratio).
        rows: of the manifest, replacements of bad clips in their places.
        index: number of the micro-batch in its epoch, all processes counted.
        epoch: number of the epoch.
        latents: [B, C, T, h, w] as the video encoder gave them.
        text_embeddings: [B, 1, L, C] as the text encoder gave them, zero beyond the real tokens.
        text_mask: int64 [B, L] on the CPU, 1 for a real token.
    """

    video: torch.Tensor | None
    text: list[str]
    num_frames: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    ar: torch.Tensor
    fps: torch.Tensor
    bucket: BucketId
    rows: tuple[int, ...]
    index: int
    epoch: int
    latents: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def drop_content(self) -> None:
        """Forget clips or features, of which the model's inputs have been made. What is known of them stays."""
        self.video = self.latents = self.text_embeddings = None

    def pin_memory(self) -> Batch:
        """The same with its large CPU tensors in page-locked memory, from which copies to the GPU can overlap."""
        names = ("video", "latents", "text_embeddings")
        tensors = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self,
            **{
                name: tensor.pin_memory()
                for name, tensor in tensors.items()
                if tensor is not None and tensor.device.type == "cpu"
            },
        )


def make_conditions(thw: tuple[int, int, int], clips: Sequence[Clip], fps_divisor: int = 1) -> dict[str, torch.Tensor]:
    """What the model is told about the clips of a micro-batch.

    Args:
        thw: frames, height and width of the bucket.
        clips: their rows in the manifest.
        fps_divisor: by which the frame rates of videos are divided; images have 120 in any case, as in Open-Sora.

    Returns:
        num_frames, height, width, ar, fps: float32 [B].
    """
    frames, height, width = (torch.full((len(clips),), float(value)) for value in thw)
    fps = [IMAGE_FPS if is_image_path(clip.path) else clip.fps / fps_divisor for clip in clips]
    return {
        "num_frames": frames,
        "height": height,
        "width": width,
        "ar": width / height,
        "fps": torch.tensor(fps, dtype=torch.float32),
    }
