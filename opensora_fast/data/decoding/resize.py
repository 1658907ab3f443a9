"""The one definition of "resize until the target is covered, then crop the center".

Every decoder takes its sizes and offsets from `CoverCrop.of_video` or `CoverCrop.of_image`. The two differ, as in
Open-Sora: a video is resized with plain bilinear interpolation (no smoothing before it shrinks) and its crop offset is
rounded down; an image is resized by Pillow's bicubic filter and its offset rounded to the nearest, halves to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional

from opensora_fast.data.decoding.clips import ClipError
from opensora_fast.data.decoding.still_images import to_rgb
from opensora_fast.data.decoding.video_index import MAXIMUM_PIXELS

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class CoverCrop:
    """Resize to (scaled_height, scaled_width), then take (height, width) at (top, left). All in pixels."""

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of_video(cls, source_size: tuple[int, int], size: tuple[int, int]) -> CoverCrop:
        """For frames of `source_size` (height, width) and a target `size`. See `_cover`."""
        scaled_height, scaled_width = _cover(source_size, size)
        top, left = (scaled_height - size[0]) // 2, (scaled_width - size[1]) // 2
        return cls(scaled_height, scaled_width, top, left, *size)

    @classmethod
    def of_image(cls, source_size: tuple[int, int], size: tuple[int, int]) -> CoverCrop:
        """For an image of `source_size` (height, width) and a target `size`. See `_cover`."""
        scaled_height, scaled_width = _cover(source_size, size)
        top, left = round((scaled_height - size[0]) / 2), round((scaled_width - size[1]) / 2)
        return cls(scaled_height, scaled_width, top, left, *size)


def _cover(source_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Smallest scaled size of the source's aspect ratio that covers the target.

    Raises:
        ValueError: a side is below 1.
        ClipError: it would be larger than a frame may be, of which the crop leaves next to nothing.
    """
    source_height, source_width = source_size
    height, width = size
    if min(source_height, source_width, height, width) < 1:
        raise ValueError(f"sizes must be at least 1 x 1, got source {source_size} and target {size}")
    height_ratio, width_ratio = height / source_height, width / source_width
    if height_ratio > width_ratio:
        scaled = height, round(source_width * height_ratio)
    else:
        scaled = round(source_height * width_ratio), width
    if scaled[0] * scaled[1] > MAXIMUM_PIXELS:
        raise ClipError(
            f"a strip of {source_height} x {source_width} pixels would be resized to {scaled[0]} x {scaled[1]} to "
            f"cover {height} x {width}"
        )
    return scaled


def resize_frame(frame: np.ndarray, output: torch.Tensor) -> None:
    """Resize and crop one video frame into a slice of a clip.

    Args:
        frame: uint8 [H, W, 3].
        output: float32 [3, height, width]; receives values in [-1, 1]. Its size is the target.
    """
    height, width = output.shape[-2:]
    crop = CoverCrop.of_video(frame.shape[:2], (height, width))
    pixels = torch.from_numpy(frame).permute(2, 0, 1)
    if frame.shape[:2] != (crop.scaled_height, crop.scaled_width):
        # Channels stay last in memory: bilinear interpolation is several times faster on it than on separate planes.
        pixels = torch.nn.functional.interpolate(
            pixels.unsqueeze(0).float(),
            size=(crop.scaled_height, crop.scaled_width),
            mode="bilinear",
            align_corners=False,
            antialias=False,
        )[0]
    output.copy_(pixels[:, crop.top : crop.top + height, crop.left : crop.left + width])
    output.div_(127.5).sub_(1.0)


def resize_image(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resize and crop a still image.

    Args:
        image: any mode; see `still_images.to_rgb`.
        size: (height, width) in pixels.

    Returns:
        float32 [3, 1, height, width] in [-1, 1].
    """
    from PIL import Image

    image = to_rgb(image)
    crop = CoverCrop.of_image((image.height, image.width), size)
    image = image.resize((crop.scaled_width, crop.scaled_height), Image.Resampling.BICUBIC)
    image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.div_(127.5).sub_(1.0).unsqueeze(1).contiguous()
