"""The order in which a run sees its clips: deterministic, entered anywhere, for any number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opensora_fast.data.buckets.bucket import Bucket, BucketId
from opensora_fast.data.buckets.explain import PATCH, Explanation, describe_no_batches, explain_plan
from opensora_fast.data.buckets.plan import ClipSizes, EpochPlan, count_steps, plan_epoch

# Plans kept: a loader that reads ahead may be in the next epoch while a clip of this one still needs a replacement.
KEPT_PLANS = 2


@dataclass(frozen=True)
class MicroBatch:
    """Clips that go through the model at once: all of one bucket.

    `rows` are those of the manifest. `index` is the number of the micro-batch in its epoch, all processes counted.
    """

    bucket: BucketId
    rows: tuple[int, ...]
    index: int
    epoch: int


class BucketSampler:
    """Gives the micro-batches of one process.

    The micro-batches of an epoch form one shuffled list that depends on table, buckets, costs, seed and epoch only. In
    each step the processes take consecutive ones. So a run that stops and goes on with another number of processes
    keeps the order of the list, and loses or repeats nothing.

    An epoch in which every clip lost the draw of its keep probability (it takes a very small table) has none.

    Args:
        clips: the table, a `Manifest`.
        bucket: the buckets.
        frame_interval: source frames for each frame that is kept.
        seed: of the run; decides draws and order.
        rank: number of this process.
        world_size: number of processes.
        drop_last: True leaves out clips that do not fill a micro-batch, and micro-batches that do not fill a step.
            False fills up with other clips of the bucket and with the first micro-batches of the epoch.
        costs: [buckets] of a micro-batch of each bucket: the processes of a step are to have about the same to do, see
            `plan_epoch`. None: the order is random.

    Raises:
        ValueError: there would be nothing to do for a process; the message has the counts per bucket and the fix.
    """

    def __init__(
        self,
        clips: ClipSizes,
        bucket: Bucket,
        *,
        frame_interval: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        costs: np.ndarray | None = None,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1, got rank {rank} and world_size {world_size}")
        self.clips = clips
        self.bucket = bucket
        self.frame_interval = frame_interval
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.costs = costs
        self._plans: dict[int, EpochPlan] = {}
        if self._count_steps(self.get_plan(0), 0) == 0:
            raise ValueError(describe_no_batches(self.explain()))

    def iterate(self, epoch: int, consumed: int) -> Iterator[MicroBatch]:
        """The micro-batches of this process in an epoch, from where so many of all processes are used up.

        Behind the one of number `index`, those are index - rank + world_size.
        """
        plan = self.get_plan(epoch)
        for step in range(self._count_steps(plan, consumed)):
            yield self._get_micro_batch(plan, consumed + step * self.world_size + self.rank)

    def count_steps_left(self, epochs: int, epoch: int, consumed: int) -> int | None:
        """Steps from a position in an epoch, as in `iterate`, to the end of so many epochs; None where draws make some
        epochs longer than others."""
        if not self._has_equal_epochs():
            return None
        plan = self.get_plan(epoch)  # which is kept for the training that follows
        return self._count_steps(plan, consumed) + (epochs - epoch - 1) * self._count_steps(plan, 0)

    def replacement(self, micro_batch: MicroBatch, row: int, attempt: int) -> int:
        """Another row of the same bucket for one that cannot be used.

        The same arguments give the same row on every replay. Rows outside the micro-batch come first, then its others.

        Args:
            micro_batch: as handed out.
            row: the bad row in it.
            attempt: 0, 1, ... as long as the replacements are bad, too.

        Raises:
            ValueError: the bucket has no further row.
        """
        plan = self.get_plan(micro_batch.epoch)
        bucket_index = int(plan.assigned[row])
        first, count = int(plan.first[bucket_index]), int(plan.clips[bucket_index])
        members = plan.rows[first : first + count]
        # A start that depends on the row, so that two bad rows of a micro-batch hardly ever get the same one.
        start = int(np.random.SeedSequence([self.seed, micro_batch.epoch, row]).generate_state(1)[0]) % count
        inside = dict.fromkeys(other for other in micro_batch.rows if other != row)
        for offset in range(count):
            candidate = int(members[(start + offset) % count])
            if candidate != row and candidate not in inside:
                if attempt == 0:
                    return candidate
                attempt -= 1
        if attempt < len(inside):
            return list(inside)[attempt]
        name = ", ".join(map(str, plan.bucket.ids[bucket_index]))
        raise ValueError(f"bucket {name} has no further clip in place of row {row}; it has {count} in all")

    def substitutes(self, micro_batch: MicroBatch) -> Iterator[MicroBatch]:
        """Micro-batches that may stand in for one whose bucket has no usable clip: one of each other bucket, those that
        come next in the epoch first. They have its number, for they take its place in the run."""
        plan = self.get_plan(micro_batch.epoch)
        _, first = np.unique(np.roll(plan.bucket_of, -micro_batch.index), return_index=True)
        for offset in np.sort(first).tolist():
            other = self._get_micro_batch(plan, micro_batch.index + offset)
            if other.bucket != micro_batch.bucket:
                yield dataclasses.replace(other, index=micro_batch.index)

    def explain(self, patch: int = PATCH) -> Explanation:
        """The first epoch: batches, tokens, what is left out.

        Args:
            patch: latents to a side of the model's tokens.
        """
        return explain_plan(
            self.get_plan(0),
            self.clips,
            frame_interval=self.frame_interval,
            world_size=self.world_size,
            drop_last=self.drop_last,
            patch=patch,
        )

    def get_plan(self, epoch: int) -> EpochPlan:
        """All micro-batches of an epoch."""
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
            while len(self._plans) > KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> EpochPlan:
        return self._plan_clips(self.clips, epoch, self.costs)

    def _plan_clips(self, clips: ClipSizes, epoch: int, costs: np.ndarray | None = None) -> EpochPlan:
        return plan_epoch(
            clips,
            self.bucket,
            frame_interval=self.frame_interval,
            seed=self.seed,
            epoch=epoch,
            drop_last=self.drop_last,
            costs=costs,
        )

    def _has_equal_epochs(self) -> bool:
        entries = [entry for resolution in self.bucket.resolutions for entry in resolution.frames]
        return all(entry.keep_probability in (0.0, 1.0) for entry in entries)

    def _count_steps(self, plan: EpochPlan, consumed: int) -> int:
        return count_steps(max(0, len(plan) - consumed), self.world_size, self.drop_last)

    def _get_micro_batch(self, plan: EpochPlan, index: int) -> MicroBatch:
        # Numbers past the end, with which the last step is filled up, stand for the first micro-batches.
        listed = index % len(plan)
        bucket_id = self.bucket.ids[plan.bucket_of[listed]]
        return MicroBatch(bucket=bucket_id, rows=plan.get_rows(listed), index=index, epoch=plan.epoch)
