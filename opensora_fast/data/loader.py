"""From micro-batches of rows to batches of clips: decode, replace what is bad, run ahead of the training step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from opensora_fast.data.bad_clips import BadClipLog
from opensora_fast.data.batch import Batch
from opensora_fast.data.buckets.sampler import BucketSampler, MicroBatch
from opensora_fast.data.decoding.clips import BadClip, ClipRequest, Decoder, choose_frames
from opensora_fast.data.epoch_loader import EpochLoader
from opensora_fast.data.manifest import Manifest
from opensora_fast.data.reporting import print_line

REPLACEMENTS = 20
"""How often a place in a micro-batch is filled anew before its bucket is given up."""
SUBSTITUTES = 5
"""How many other buckets are tried then before the run is stopped."""


class _NoUsableClip(Exception):
    """A place in a micro-batch cannot be filled from its bucket."""


class ClipLoader(EpochLoader):
    """Makes batches of clips, decoded ahead in a thread.

    A clip that cannot be decoded is replaced by another of its bucket (`sampler.replacement`) and listed. A bucket may
    hold no other, as those of rare shapes do: then a micro-batch of another bucket takes the place. Nothing here has a
    state: which frames of a clip are taken depends on (seed, epoch, row) alone, so batches are the same whatever the
    number of threads or processes, the decoder, and where a run was resumed. (A time limit that strikes is the
    exception: it depends on the machine.)

    Args:
        manifest, sampler, fps_after_interval, pin_memory: see `EpochLoader`.
        decoder: decodes them; closed with the loader.
        seed: of the starts of the clips.
        prefetch: batches made ahead; 0 makes each when it is asked for. At most as many more are being decoded.
        bad_clips_path: file in which bad clips are listed (`bad_clips.BadClipLog`), or None.
        report: told in a sentence of each bad clip.

    Raises:
        ValueError: an argument is out of range. Of iterations: a place in a micro-batch could not be filled; something
            is wrong with more than single clips.
    """

    def __init__(
        self,
        manifest: Manifest,
        sampler: BucketSampler,
        decoder: Decoder,
        *,
        seed: int,
        prefetch: int = 2,
        bad_clips_path: str | os.PathLike[str] | None = None,
        report: Callable[[str], None] = print_line,
        **options: Any,
    ) -> None:
        if seed < 0 or prefetch < 0:
            raise ValueError(f"seed and prefetch must be 0 or more, got {seed} and {prefetch}")
        super().__init__(manifest, sampler, prefetch=prefetch, **options)
        self.decoder = decoder
        self.seed = seed
        self.prefetch = prefetch
        self._report = report
        self._log = BadClipLog(bad_clips_path)

    def close(self) -> None:
        """End the thread of the loader and the decoder."""
        super().close()
        self.decoder.close()

    def _make_batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        for group in self._group(micro_batches):
            yield from self._load_together(group)

    def _group(self, micro_batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Micro-batches that are decoded together, so that small ones do not leave threads of the decoder idle.

        The first one of all comes alone: the training step waits for it.
        """
        group: list[MicroBatch] = []
        enough = 1
        for micro_batch in micro_batches:
            group.append(micro_batch)
            if sum(len(member.rows) for member in group) >= enough or len(group) >= self.prefetch:
                yield group
                group = []
                enough = self.decoder.threads
        if group:
            yield group

    def _load_together(self, micro_batches: list[MicroBatch]) -> list[Batch]:
        requests = [self._make_request(row, micro_batch) for micro_batch in micro_batches for row in micro_batch.rows]
        results = iter(self.decoder.decode(requests))
        return [self._complete(micro_batch, [next(results) for _ in micro_batch.rows]) for micro_batch in micro_batches]

    def _complete(self, micro_batch: MicroBatch, clips: list[torch.Tensor | BadClip]) -> Batch:
        """Replace bad clips until none is left, or the whole micro-batch by one of another bucket."""
        substitutes = itertools.islice(self.sampler.substitutes(micro_batch), SUBSTITUTES)
        filling = micro_batch
        while True:
            try:
                return self._fill(filling, clips)
            except _NoUsableClip as error:
                reason = str(error)
            filling = next(substitutes, None)
            if filling is None:
                raise ValueError(
                    f"{reason}; nor could other buckets be used. Look at the data (`opensora-fast data validate`)"
                )
            self._report(
                f"{reason}; micro-batch {micro_batch.index} of epoch {micro_batch.epoch} is of bucket "
                f"{_name(filling)} instead"
            )
            clips = self.decoder.decode([self._make_request(row, filling) for row in filling.rows])

    def _fill(self, micro_batch: MicroBatch, clips: list[torch.Tensor | BadClip]) -> Batch:
        """Replace bad clips until none is left. _NoUsableClip if that cannot be."""
        rows = list(micro_batch.rows)
        attempt = 0
        while bad := {place: clip for place, clip in enumerate(clips) if isinstance(clip, BadClip)}:
            for clip in bad.values():
                self._record(clip, micro_batch)
            if attempt == REPLACEMENTS:
                raise _NoUsableClip(
                    f"bucket {_name(micro_batch)}: {REPLACEMENTS} replacements of a clip could not be decoded either, "
                    f"the last one, {clip.path}, because: {clip.reason}"
                )
            for place, clip in bad.items():
                rows[place] = self._replace(micro_batch, micro_batch.rows[place], attempt, clip)
            replacements = self.decoder.decode([self._make_request(rows[place], micro_batch) for place in bad])
            for place, clip in zip(bad, replacements, strict=True):
                clips[place] = clip
            attempt += 1
        return self._make_batch(micro_batch, rows, video=torch.stack(clips))

    def _make_request(self, row: int, micro_batch: MicroBatch) -> ClipRequest:
        thw = self.sampler.bucket.get_thw(micro_batch.bucket)
        clip = self.manifest.clip(row)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, micro_batch.epoch, row))))
        frames = choose_frames(clip.num_frames, thw[0], self.sampler.frame_interval, rng)
        return ClipRequest(row, clip.path, frames, thw[1:])

    def _replace(self, micro_batch: MicroBatch, row: int, attempt: int, bad: BadClip) -> int:
        try:
            return self.sampler.replacement(micro_batch, row, attempt)
        except ValueError as error:
            raise _NoUsableClip(f"{bad.path}: {bad.reason}; and {error}") from None

    def _record(self, clip: BadClip, micro_batch: MicroBatch) -> None:
        self._log.add(clip, epoch=micro_batch.epoch, micro_batch=micro_batch.index)
        self._report(f"bad clip (row {clip.row}, replaced): {clip.path}: {clip.reason}")


def _name(micro_batch: MicroBatch) -> str:
    return ", ".join(map(str, micro_batch.bucket))
