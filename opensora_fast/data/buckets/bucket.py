"""Which bucket a clip belongs to: the rules of Open-Sora 1.1, one clip at a time.

A bucket is (resolution, frames, aspect ratio). Resolutions are tried from the largest pixel count down; one is open
to a clip of at least 0.8 times its pixels. Of its frame counts the longest that fits is taken and no shorter one is
tried: an image fits only 1 frame; a video fits `frames` if it is longer than frames * frame_interval, and never fits
1 frame. The keep probability of the pair (resolution, frames) then decides by one draw; a clip that loses it goes on
to the next smaller resolution. `assignment.py` does the same for millions of clips at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from opensora_fast.data.buckets.aspect import AspectTable, get_aspect_table

BucketId = tuple[str, int, str]
"""Resolution, frames and aspect ratio, such as ("240p", 16, "0.56")."""

MINIMUM_PIXEL_FRACTION = 0.8
EXAMPLE = '"240p": {16: (1.0, 4)}  # frames: (keep probability, batch size)'


@dataclass(frozen=True)
class FrameEntry:
    """One (resolution, frames) pair. `index` counts the pairs in the order in which they are tried."""

    frames: int
    index: int
    keep_probability: float
    batch_size: int | None
    first_bucket: int
    """Index of this pair's first aspect ratio in `Bucket.ids`."""

    def fits(self, num_frames: int | np.ndarray, frame_interval: int) -> bool | np.ndarray:
        """Whether clips of so many frames may take part: an image where there is 1 frame, else videos that are longer
        than the stretch which the frames are taken from."""
        return num_frames == 1 if self.frames == 1 else num_frames > self.frames * frame_interval


@dataclass(frozen=True)
class ResolutionEntry:
    """One resolution with its frame counts, longest first."""

    table: AspectTable
    minimum_pixels: float
    frames: tuple[FrameEntry, ...]

    @property
    def name(self) -> str:
        return self.table.resolution

    def longest_fitting(self, num_frames: int, frame_interval: int) -> FrameEntry | None:
        """The entry a clip of `num_frames` frames takes part in, or None."""
        return next((entry for entry in self.frames if entry.fits(num_frames, frame_interval)), None)


class Bucket:
    """The buckets of one configuration.

    Args:
        bucket_config: resolution name -> frames -> (keep probability in 0..1, batch size). The batch size may be None
            where the probability is 0: such a bucket stops clips from falling into shorter ones of its resolution.

    Raises:
        ValueError: the table is broken; the message names the resolution and the frames.

    Attributes:
        num_bucket: number of (resolution, frames, aspect ratio) triples.
        ids: all of them, in the order of the indices that `assignment.assign_buckets` returns.
    """

    def __init__(self, bucket_config: Mapping[str, Mapping[int, tuple[float, int | None]]]) -> None:
        checked = check_bucket_config(bucket_config)
        names = sorted(checked, key=lambda name: get_aspect_table(name).pixels, reverse=True)
        resolutions: list[ResolutionEntry] = []
        ids: list[BucketId] = []
        pair_index = 0
        for name in names:
            table = get_aspect_table(name)
            entries = []
            for frames in sorted(checked[name], reverse=True):
                probability, batch_size = checked[name][frames]
                entries.append(FrameEntry(frames, pair_index, probability, batch_size, len(ids)))
                ids.extend((name, frames, ratio) for ratio in table.names)
                pair_index += 1
            resolutions.append(ResolutionEntry(table, table.pixels * MINIMUM_PIXEL_FRACTION, tuple(entries)))
        self.config = checked
        self.resolutions = tuple(resolutions)
        self.ids: tuple[BucketId, ...] = tuple(ids)
        self.num_bucket = len(ids)
        self._pairs = {(entry.name, pair.frames): pair for entry in resolutions for pair in entry.frames}

    def __len__(self) -> int:
        return self.num_bucket

    def get_bucket_id(
        self, T: int, H: int, W: int, frame_interval: int = 1, seed: int | None = None
    ) -> BucketId | None:
        """The bucket of a clip of T frames and H x W pixels, or None if it is dropped.

        Args:
            T: frames in the clip; 1 is an image.
            H: height in pixels.
            W: width in pixels.
            frame_interval: source frames for each frame that is kept.
            seed: of the draws; needed only where a keep probability lies between 0 and 1.

        Raises:
            ValueError: a draw is needed and there is no seed.
        """
        for resolution in self.resolutions:
            if H * W < resolution.minimum_pixels:
                continue
            entry = resolution.longest_fitting(T, frame_interval)
            if entry is not None and _is_kept(entry, resolution.name, seed):
                return resolution.name, entry.frames, resolution.table.nearest(H, W)
        return None

    def get_thw(self, bucket_id: BucketId) -> tuple[int, int, int]:
        """Frames, height and width (pixels) of the clips in a bucket."""
        if len(bucket_id) != 3:
            raise ValueError(f"bucket id {bucket_id!r} must be (resolution, frames, aspect ratio)")
        entry = self._get_pair(bucket_id)
        sizes = get_aspect_table(bucket_id[0]).sizes
        if bucket_id[2] not in sizes:
            raise ValueError(
                f"resolution {bucket_id[0]} has no aspect ratio {bucket_id[2]!r}; it has {', '.join(sizes)}"
            )
        height, width = sizes[bucket_id[2]]
        return entry.frames, height, width

    def get_batch_size(self, bucket_id: Sequence) -> int | None:
        """Batch size of a bucket, given (resolution, frames) or the whole id."""
        return self._get_pair(bucket_id).batch_size

    def get_prob(self, bucket_id: Sequence) -> float:
        """Keep probability of a bucket, given (resolution, frames) or the whole id."""
        return self._get_pair(bucket_id).keep_probability

    def _get_pair(self, bucket_id: Sequence) -> FrameEntry:
        pair = self._pairs.get(tuple(bucket_id[:2]))
        if pair is None:
            raise ValueError(f"there is no bucket {tuple(bucket_id)!r} in this configuration")
        return pair


def _is_kept(entry: FrameEntry, resolution: str, seed: int | None) -> bool:
    # Upstream draws for every image, but a draw below 1 always wins and one below 0 never does.
    if entry.keep_probability in (0.0, 1.0):
        return entry.keep_probability == 1.0
    if seed is None:
        raise ValueError(
            f"bucket {resolution}, {entry.frames} frames keeps a clip with probability {entry.keep_probability}: "
            "pass a seed"
        )
    return float(np.random.default_rng(seed + entry.index).random()) < entry.keep_probability


def check_bucket_config(
    bucket_config: Mapping[str, Mapping[int, tuple[float, int | None]]],
) -> dict[str, dict[int, tuple[float, int | None]]]:
    """The same table with plain ints and floats. ValueError, naming resolution, frames and the fix, if it is broken."""
    if not isinstance(bucket_config, Mapping) or not bucket_config:
        raise ValueError(f"bucket_config must be a table with at least one resolution, such as {{{EXAMPLE}}}")
    checked: dict[str, dict[int, tuple[float, int | None]]] = {}
    for resolution, entries in bucket_config.items():
        try:
            get_aspect_table(resolution)
        except ValueError as error:
            raise ValueError(f"bucket_config: {error}") from None
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError(
                f'bucket_config["{resolution}"] must map frames to pairs, such as {EXAMPLE}; got {entries!r}'
            )
        checked[resolution] = {
            _check_frames(resolution, frames): _check_pair(resolution, frames, pair) for frames, pair in entries.items()
        }
    return checked


def _check_frames(resolution: str, frames: object) -> int:
    if isinstance(frames, bool) or not isinstance(frames, Integral) or frames < 1:
        raise ValueError(
            f'bucket_config["{resolution}"]: frames must be a whole number, 1 for images or more; got {frames!r}'
        )
    return int(frames)


def _check_pair(resolution: str, frames: object, pair: object) -> tuple[float, int | None]:
    place = f'bucket_config["{resolution}"][{frames}]'
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"{place} must be (keep probability, batch size), such as (1.0, 4); got {pair!r}")
    probability, batch_size = pair
    if isinstance(probability, bool) or not isinstance(probability, Real) or not 0 <= probability <= 1:
        raise ValueError(f"{place}: the keep probability must be between 0 and 1; got {probability!r}")
    if batch_size is None:
        if probability > 0:
            raise ValueError(
                f"{place}: keeps clips with probability {probability} but has no batch size: "
                "give one, or set the probability to 0.0"
            )
        return float(probability), None
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"{place}: the batch size must be a whole number of 1 or more; got {batch_size!r}")
    return float(probability), int(batch_size)
