"""What yields batches epoch by epoch, whatever they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from opensora_fast.data.batch import Batch
from opensora_fast.data.buckets.sampler import BucketSampler, MicroBatch
from opensora_fast.data.prefetch import EpochPrefetcher


class EpochLoader(ABC):
    """Makes the batches of a sampler's micro-batches, ahead in a thread.

    Args:
        sampler: gives the micro-batches.
        prefetch: batches made ahead; 0 makes each when it is asked for.
    """

    def __init__(self, sampler: BucketSampler, prefetch: int) -> None:
        self.sampler = sampler
        self._epochs: EpochPrefetcher[Batch] = EpochPrefetcher(prefetch)

    def load(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """The batches of these micro-batches. Starting any other ends this one."""
        return self._epochs.run(lambda: self._make_batches(micro_batches))

    def iterate(self, epoch: int, consumed: int) -> Iterator[Batch]:
        """The batches of an epoch, from where so many of its micro-batches are used up (all processes counted).

        While the last batches are used the first ones of the next epoch are made, with which its iteration begins if
        it comes next. Starting any other ends this one.
        """
        return self._epochs.run_on(lambda *place: self._make_batches(self.sampler.iterate(*place)), epoch, consumed)

    def close(self) -> None:
        """End the thread of the loader."""
        self._epochs.close()

    @abstractmethod
    def _make_batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """The batches of micro-batches, in their order. Runs in the thread."""
