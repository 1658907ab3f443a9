"""What is asked of a decoder, what it answers, and which frames of a clip are taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
"""Files with these endings are still images, all others videos, as in Open-Sora."""


@dataclass(frozen=True)
class ClipRequest:
    """Some frames of one file, resized and cropped to one size.

    `frames` are indices into the frames of the file in the order in which they are shown; `size` is (height, width) in
    pixels; `row` is the row of the manifest, which only travels along.
    """

    row: int
    path: str
    frames: tuple[int, ...]
    size: tuple[int, int]

    @property
    def is_image(self) -> bool:
        return is_image_path(self.path)


@dataclass
class BadClip:
    """A clip that could not be decoded, and why, in a few words."""

    row: int
    path: str
    reason: str


class UnsupportedClip(BadClip):
    """A clip that only this decoder cannot take: another one may."""


class ClipError(Exception):
    """One clip cannot be used. Decoders turn it into a `BadClip`, so it never leaves them."""


class Unsupported(ClipError):
    """It is the decoder that cannot use the clip. It is turned into an `UnsupportedClip`."""


class Decoder(Protocol):
    """Decodes clips. All decoders give the same frames for the same request.

    Attributes:
        threads: clips that are decoded at the same time; fewer in a call leave processors idle.
    """

    threads: int

    def decode(self, requests: Sequence[ClipRequest]) -> list[torch.Tensor | BadClip]:
        """Answers in the order of the requests: float32 [3, T, H, W] in [-1, 1], or a `BadClip`."""

    def close(self) -> None:
        """Stop threads and processes and give back memory. The decoder cannot be used afterwards."""


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Whether a file counts as a still image: decided by its ending alone."""
    return os.path.splitext(os.fspath(path))[1].lower() in IMAGE_EXTENSIONS


def choose_frames(total_frames: int, num_frames: int, frame_interval: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Frames of a training clip: `num_frames` of the num_frames * frame_interval frames after a random start.

    They lie evenly between the first and the last frame of that stretch, rounded down, so their distance is not
    constant: 4 frames at interval 2 starting at 0 are 0, 2, 4, 7. A file shorter than the stretch is used whole.

    Args:
        total_frames: frames in the file.
        num_frames: frames wanted.
        frame_interval: source frames for each frame wanted.
        rng: gives the start, uniform over 0 .. total_frames - num_frames * frame_interval - 1 (one draw).

    Returns:
        `num_frames` indices, not decreasing.

    Raises:
        ValueError: a count is below 1, or the file has fewer frames than are wanted.
    """
    if num_frames < 1 or frame_interval < 1:
        raise ValueError(f"num_frames and frame_interval must be 1 or more, got {num_frames} and {frame_interval}")
    if total_frames < num_frames:
        raise ValueError(f"the file has {total_frames} frames, {num_frames} are wanted")
    stretch = num_frames * frame_interval
    begin = int(rng.integers(0, max(0, total_frames - stretch - 1), endpoint=True))
    end = min(begin + stretch, total_frames)
    # NumPy's own linspace, not exact fractions: where they differ in the last bit, Open-Sora has NumPy's.
    return tuple(np.linspace(begin, end - 1, num_frames, dtype=int).tolist())
