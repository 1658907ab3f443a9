"""The micro-batches of one epoch, in order: which bucket, which rows. A pure function of table, buckets and seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from opensora_fast.data.buckets.assignment import DROPPED, assign_buckets
from opensora_fast.data.buckets.balance import balance
from opensora_fast.data.buckets.bucket import Bucket


class ClipSizes(Protocol):
    """What a plan needs to know of the clips, such as a `Manifest`: integers [rows] each, sizes in pixels."""

    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All micro-batches of an epoch.

    Attributes:
        epoch: number of the epoch.
        bucket: the buckets.
        assigned: int32 [rows of the table], index into `bucket.ids` or -1.
        rows: int64 [clips in buckets], rows of the table, those of one bucket together.
        first, clips: int64 [buckets]; the clips of bucket b are rows[first[b] : first[b] + clips[b]].
        batch_size: int64 [buckets].
        bucket_of: int32 [micro-batches], index into `bucket.ids`.
        number_of: int64 [micro-batches], the how-manieth of its bucket each micro-batch is.
    """

    epoch: int
    bucket: Bucket
    assigned: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    clips: np.ndarray
    batch_size: np.ndarray
    bucket_of: np.ndarray
    number_of: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket_of)

    def count_batches(self) -> np.ndarray:
        """Micro-batches of each bucket: int64 [buckets]."""
        return np.bincount(self.bucket_of, minlength=self.bucket.num_bucket)

    def get_rows(self, index: int) -> tuple[int, ...]:
        """The rows of a micro-batch. The last one of a bucket is filled up from the bucket's first clips."""
        bucket_index = self.bucket_of[index]
        size = self.batch_size[bucket_index]
        positions = self.number_of[index] * size + np.arange(size)
        rows = self.rows[self.first[bucket_index] + positions % self.clips[bucket_index]]
        return tuple(rows.tolist())


def count_steps(micro_batches: int, world_size: int, drop_last: bool) -> int:
    """Steps in which so many processes take a list of micro-batches, one each at a time.

    Args:
        micro_batches: of all processes together.
        world_size: number of processes.
        drop_last: whether those that do not fill a step are left out; otherwise the last step is filled up.
    """
    return micro_batches // world_size if drop_last else -(-micro_batches // world_size)


def plan_epoch(
    clips: ClipSizes,
    bucket: Bucket,
    *,
    frame_interval: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    costs: np.ndarray | None = None,
) -> EpochPlan:
    """Put the clips into buckets, cut the buckets into micro-batches, and shuffle.

    Args:
        clips: the table.
        bucket: the buckets.
        frame_interval: source frames for each frame that is kept.
        seed: of the draws of the keep probabilities (with the seeds of Open-Sora) and of the order.
        epoch: changes both.
        shuffle: False keeps the clips of a bucket in the order of the table, and the buckets in their own.
        drop_last: leave out what does not fill a micro-batch. Otherwise the last micro-batch of a bucket is filled up
            with clips of the bucket, again and again if need be, so that every clip is used.
        costs: [buckets] of a micro-batch of each bucket, in any unit: those that follow each other are to cost about
            the same (see `balance`). None leaves the shuffled order; without `shuffle` it changes nothing.
    """
    assigned = assign_buckets(
        clips.num_frames, clips.height, clips.width, bucket, frame_interval=frame_interval, seed=seed, epoch=epoch
    )
    order = _random_order(len(assigned), seed, epoch, purpose=0) if shuffle else np.arange(len(assigned))
    order = order[assigned[order] != DROPPED]
    rows = order[np.argsort(assigned[order], kind="stable")]
    count = np.bincount(assigned[order], minlength=bucket.num_bucket)
    # A bucket without a batch size has keep probability 0 and never holds a clip.
    batch_size = np.array([bucket.get_batch_size(bucket_id) or 1 for bucket_id in bucket.ids])
    batches = count // batch_size if drop_last else -(-count // batch_size)
    bucket_of = np.repeat(np.arange(bucket.num_bucket, dtype=np.int32), batches)
    number_of = np.arange(len(bucket_of)) - np.repeat(np.cumsum(batches) - batches, batches)
    if shuffle:
        order = _random_order(len(bucket_of), seed, epoch, purpose=1)
        bucket_of, number_of = bucket_of[order], number_of[order]
    plan = EpochPlan(
        epoch=epoch,
        bucket=bucket,
        assigned=assigned,
        rows=rows,
        first=np.cumsum(count) - count,
        clips=count,
        batch_size=batch_size,
        bucket_of=bucket_of,
        number_of=number_of,
    )
    return balance_plan(plan, costs, seed) if shuffle and costs is not None else plan


def balance_plan(plan: EpochPlan, costs: np.ndarray, seed: int) -> EpochPlan:
    """The micro-batches of a shuffled plan in an order in which those that follow each other cost about the same.

    Args:
        costs: [buckets] of a micro-batch of each bucket.
    """
    order = balance(costs[plan.bucket_of], seed, plan.epoch)
    return replace(plan, bucket_of=plan.bucket_of[order], number_of=plan.number_of[order])


def _random_order(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A random permutation that stays the same in all versions of NumPy, which its `permutation` need not."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])).random_raw(count)
    return np.argsort(keys, kind="stable")
