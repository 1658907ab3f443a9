"""What yields batches epoch by epoch, whatever they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from opensora_fast.data.batch import Batch, make_conditions
from opensora_fast.data.buckets.sampler import BucketSampler, MicroBatch
from opensora_fast.data.manifest import Manifest
from opensora_fast.data.prefetch import EpochPrefetcher


class EpochLoader(ABC):
    """Makes the batches of a sampler's micro-batches, ahead in a thread.

    Args:
        manifest: the table of clips.
        sampler: gives the micro-batches; its `frame_interval` is that of the clips.
        prefetch: batches made ahead; 0 makes each when it is asked for.
        fps_after_interval: True divides the frame rate that the model is told by the `frame_interval`, which is the
            rate of the clip as it is trained on. Open-Sora 1.1 tells it the rate of the file, and so is the default.
        pin_memory: put batches in page-locked memory, for copying to a GPU during a step.
    """

    def __init__(
        self,
        manifest: Manifest,
        sampler: BucketSampler,
        *,
        prefetch: int = 2,
        fps_after_interval: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.manifest = manifest
        self.sampler = sampler
        self.pin_memory = pin_memory
        self._fps_divisor = sampler.frame_interval if fps_after_interval else 1
        self._epochs: EpochPrefetcher[Batch] = EpochPrefetcher(prefetch)

    def load(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """The batches of these micro-batches. Starting any other ends this one."""
        return self._epochs.run(lambda: self._pin(self._make_batches(micro_batches)))

    def iterate(self, epoch: int, consumed: int) -> Iterator[Batch]:
        """The batches of an epoch, from where so many of its micro-batches are used up (all processes counted).

        While the last batches are used the first ones of the next epoch are made, with which its iteration begins if
        it comes next. Starting any other ends this one.
        """
        return self._epochs.run_on(
            lambda *place: self._pin(self._make_batches(self.sampler.iterate(*place))), epoch, consumed
        )

    def close(self) -> None:
        """End the thread of the loader."""
        self._epochs.close()

    def _pin(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch.pin_memory() if self.pin_memory else batch

    def _make_batch(self, micro_batch: MicroBatch, rows: Sequence[int], **content: Any) -> Batch:
        """A micro-batch of these rows with what the model is told about them, and with its content."""
        clips = [self.manifest.clip(row) for row in rows]
        return Batch(
            text=[clip.text for clip in clips],
            **make_conditions(self.sampler.bucket.get_thw(micro_batch.bucket), clips, self._fps_divisor),
            bucket=micro_batch.bucket,
            rows=tuple(rows),
            index=micro_batch.index,
            epoch=micro_batch.epoch,
            **content,
        )

    @abstractmethod
    def _make_batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """The batches of micro-batches, in their order. Runs in the thread."""
