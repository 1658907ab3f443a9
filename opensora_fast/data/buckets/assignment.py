"""Buckets of millions of clips at once: the same result as `Bucket.get_bucket_id`, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opensora_fast.data.buckets.bucket import Bucket, FrameEntry, ResolutionEntry
from opensora_fast.data.buckets.draws import draw_first_uniform

DROPPED = -1
BLOCK_ROWS = 1 << 16

TOO_SMALL, NO_IMAGE_BUCKET, TOO_SHORT, LOST_DRAW = 0, 1, 2, 3
DROP_REASONS = (
    "fewer than 0.8 times the pixels of the smallest resolution",
    "an image, and no resolution of its size has a 1-frame bucket",
    "too short: a video needs more than frames x frame_interval frames of the shortest bucket",
    "lost the draw of the keep probability",
)
"""Why a clip is in no bucket; indexed by the codes that `find_drop_reasons` returns."""


def assign_buckets(
    num_frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    bucket: Bucket,
    *,
    frame_interval: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """The bucket of every clip.

    Row i gets what `bucket.get_bucket_id(T, H, W, frame_interval, seed + epoch + i * bucket.num_bucket)` returns, which
    are the seeds that Open-Sora's sampler uses.

    Args:
        num_frames: integers [n], 1 for an image.
        height: integers [n], pixels.
        width: integers [n], pixels.
        bucket: the buckets.
        frame_interval: source frames for each frame that is kept.
        seed: of the run, 0 or more.
        epoch: added to the seed.

    Returns:
        int32 [n]: index into `bucket.ids`, or -1 (`DROPPED`).

    Raises:
        ValueError: a column is not a row of integers, or seed, epoch or frame_interval is out of range.
    """
    num_frames, height, width = _check_columns(num_frames, height, width)
    if frame_interval < 1:
        raise ValueError(f"frame_interval must be 1 or more, got {frame_interval}")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}")
    last_seed = seed + epoch + len(num_frames) * bucket.num_bucket
    if last_seed >= 2**64:
        raise ValueError(f"seed {seed} is too large: the seeds of the rows must stay below 2**64")
    assigned = np.empty(len(num_frames), np.int32)
    for start in range(0, len(num_frames), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        assigned[block] = _assign_block(
            num_frames[block].astype(np.int64, copy=False),
            height[block].astype(np.int64, copy=False),
            width[block].astype(np.int64, copy=False),
            bucket,
            frame_interval,
            first_seed=seed + epoch + start * bucket.num_bucket,
        )
    return assigned


def find_drop_reasons(
    num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, bucket: Bucket, *, frame_interval: int = 1
) -> np.ndarray:
    """For clips that are in no bucket: why. int8 [n], indices into `DROP_REASONS`."""
    num_frames, height, width = _check_columns(num_frames, height, width)
    pixels = height.astype(np.int64) * width
    large_enough = np.zeros(len(pixels), bool)
    fits = np.zeros(len(pixels), bool)
    for resolution in bucket.resolutions:
        eligible = pixels >= resolution.minimum_pixels
        large_enough |= eligible
        for entry in resolution.frames:
            fits |= eligible & entry.fits(num_frames, frame_interval)
    reason = np.where(num_frames == 1, NO_IMAGE_BUCKET, TOO_SHORT)
    return np.where(fits, LOST_DRAW, np.where(large_enough, reason, TOO_SMALL)).astype(np.int8)


def _check_columns(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    arrays = tuple(np.asarray(column) for column in columns)
    for name, array in zip(("num_frames", "height", "width"), arrays, strict=True):
        if array.dtype.kind not in "iu" or array.ndim != 1 or len(array) != len(arrays[0]):
            raise ValueError(f"{name} must be a row of {len(arrays[0])} integers, got {array.dtype} {array.shape}")
    return arrays


def _assign_block(
    num_frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    bucket: Bucket,
    frame_interval: int,
    first_seed: int,
) -> np.ndarray:
    assigned = np.full(len(num_frames), DROPPED, np.int32)
    pixels = height * width
    open_rows = np.arange(len(num_frames))
    for resolution in bucket.resolutions:
        candidates = open_rows[pixels[open_rows] >= resolution.minimum_pixels]
        for entry, rows in _split_by_frames(resolution, candidates, num_frames, frame_interval):
            rows = rows[_win_draws(entry, rows, first_seed, bucket.num_bucket)]
            ratio = resolution.table.nearest_index(height[rows] / width[rows])
            assigned[rows] = entry.first_bucket + ratio
        open_rows = open_rows[assigned[open_rows] == DROPPED]
    return assigned


def _split_by_frames(
    resolution: ResolutionEntry, rows: np.ndarray, num_frames: np.ndarray, frame_interval: int
) -> Iterator[tuple[FrameEntry, np.ndarray]]:
    """Each frame count of the resolution with the rows for which it is the longest that fits."""
    for entry in resolution.frames:
        fitting = entry.fits(num_frames[rows], frame_interval)
        yield entry, rows[fitting]
        rows = rows[~fitting]


def _win_draws(entry: FrameEntry, rows: np.ndarray, first_seed: int, num_bucket: int) -> np.ndarray:
    """Which rows win the draw of this entry: bool [n]."""
    if entry.keep_probability in (0.0, 1.0):
        return np.full(len(rows), entry.keep_probability == 1.0)
    seeds = np.uint64(first_seed + entry.index) + rows.astype(np.uint64) * np.uint64(num_bucket)
    return draw_first_uniform(seeds) < entry.keep_probability
