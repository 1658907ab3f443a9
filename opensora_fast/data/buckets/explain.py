"""What a bucket configuration makes of a table of clips: batches, tokens, and what is left out and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np

from opensora_fast.data.buckets.assignment import DROP_REASONS, DROPPED, find_drop_reasons
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.plan import ClipSizes, EpochPlan, count_steps, plan_epoch

LATENT_STRIDE = 8  # pixels to a side of a latent; the VAE's, floor division as upstream
PATCH = 2  # latents to a side of a token, in the published model
FILL_HINT = "lower the batch size or set drop_last=False"
SHOWN_BUCKETS = 20


@dataclass(frozen=True)
class BucketLine:
    """One bucket that holds clips. `tokens` are those of the model for one micro-batch, text not counted."""

    resolution: str
    frames: int
    aspect_ratio: str
    height: int
    width: int
    clips: int
    batch_size: int
    micro_batches: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{_name_pair(self.resolution, self.frames)}, {self.aspect_ratio}"


@dataclass(frozen=True)
class PairLine:
    """One (resolution, frames) pair of the configuration with a keep probability above 0."""

    resolution: str
    frames: int
    keep_probability: float
    batch_size: int
    clips: int
    micro_batches: int


@dataclass(frozen=True)
class Explanation:
    """One epoch of a configuration on a table.

    Attributes:
        clips: rows of the table.
        used_clips: rows that are in a micro-batch.
        micro_batches: of the epoch, all processes together.
        steps: micro-batches of each process.
        world_size: processes.
        drop_last: whether incomplete micro-batches are left out.
        buckets: those that hold clips, largest first.
        pairs: all (resolution, frames) pairs that may keep clips.
        dropped: reason -> clips that are in no micro-batch.
        warnings: what a user should know, in sentences.
    """

    clips: int
    used_clips: int
    micro_batches: int
    steps: int
    world_size: int
    drop_last: bool
    buckets: list[BucketLine]
    pairs: list[PairLine]
    dropped: dict[str, int]
    warnings: list[str]

    def get_empty_pairs(self) -> list[PairLine]:
        """Pairs that are configured to keep clips and give no micro-batch."""
        return [pair for pair in self.pairs if pair.micro_batches == 0]

    def to_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """The same as text for a person."""
        lines = [_format_row("bucket", "size", "clips", "batch size", "micro-batches", "tokens/micro-batch")]
        lines += [
            _format_row(
                line.name,
                f"{line.height} x {line.width}",
                line.clips,
                line.batch_size,
                line.micro_batches,
                line.tokens,
            )
            for line in self.buckets
        ]
        lines.append(
            f"{self.used_clips} of {_count(self.clips, 'clip')} in {_count(self.micro_batches, 'micro-batch')}: "
            f"{_count(self.steps, 'step')} of {_count(self.world_size, 'micro-batch')}"
        )
        lines += [f"left out: {_count(count, 'clip')}, {reason}" for reason, count in self.dropped.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def count_tokens(num_frames: int, height: int, width: int, patch: int) -> int:
    """Tokens of one clip in the model: one for patch x patch latents of 8 x 8 pixels each, in every frame."""
    rows, columns = (-(-(size // LATENT_STRIDE) // patch) for size in (height, width))
    return num_frames * rows * columns


def explain_buckets(
    clips: ClipSizes,
    bucket: Bucket,
    *,
    frame_interval: int = 1,
    seed: int = 0,
    epoch: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    patch: int = PATCH,
) -> Explanation:
    """Explain an epoch; the arguments are those of `BucketSampler` and of its `explain`."""
    arguments = {"frame_interval": frame_interval, "seed": seed, "epoch": epoch, "drop_last": drop_last}
    plan = plan_epoch(clips, bucket, shuffle=False, **arguments)
    return explain_plan(
        plan, clips, frame_interval=frame_interval, world_size=world_size, drop_last=drop_last, patch=patch
    )


def explain_plan(
    plan: EpochPlan, clips: ClipSizes, *, frame_interval: int, world_size: int, drop_last: bool, patch: int
) -> Explanation:
    """Explain a plan that has been made already."""
    batches = plan.count_batches()
    used = np.minimum(plan.clips, batches * plan.batch_size)
    buckets = _list_buckets(plan, batches, patch)
    pairs = _list_pairs(plan, batches)
    steps = count_steps(len(plan), world_size, drop_last)
    dropped = _count_dropped(plan, clips, frame_interval)
    incomplete = int((plan.clips - used).sum())
    if incomplete:
        dropped[f"did not fill a micro-batch ({FILL_HINT})"] = incomplete
    return Explanation(
        clips=len(plan.assigned),
        used_clips=int(used.sum()),
        micro_batches=len(plan),
        steps=steps,
        world_size=world_size,
        drop_last=drop_last,
        buckets=buckets,
        pairs=pairs,
        dropped=dropped,
        warnings=_list_warnings(plan, batches, pairs, steps, world_size, drop_last),
    )


def describe_no_batches(explanation: Explanation) -> str:
    """Error message for a configuration that gives a process nothing to do: counts per bucket, and the fix."""
    if explanation.micro_batches:
        lines = [
            f"{_count(explanation.micro_batches, 'micro-batch')} cannot serve "
            f"{_count(explanation.world_size, 'process')} with drop_last=True: "
            "use fewer processes, smaller batch sizes, or drop_last=False"
        ]
    else:
        lines = [f"bucket_config gives no micro-batch from {_count(explanation.clips, 'clip')}:"]
    largest = sorted(explanation.buckets, key=lambda line: line.clips, reverse=True)
    for line in largest[:SHOWN_BUCKETS]:
        lines.append(f"  {line.name}: {_count(line.clips, 'clip')}, batch size {line.batch_size}")
    if len(largest) > SHOWN_BUCKETS:
        lines.append(
            f"  and {len(largest) - SHOWN_BUCKETS} more buckets with at most {largest[SHOWN_BUCKETS].clips} each"
        )
    lines += [f"  left out: {_count(count, 'clip')}, {reason}" for reason, count in explanation.dropped.items()]
    if not explanation.micro_batches:
        fixes = ["add a resolution or frame count that fits the clips", "raise the keep probabilities"]
        if explanation.buckets:
            fixes = ["lower the batch sizes", "set drop_last=False", "add clips"]
        lines.append(f"Fix: {', or '.join(fixes)}. `opensora-fast buckets explain` shows the effect.")
    return "\n".join(lines)


def _list_buckets(plan: EpochPlan, batches: np.ndarray, patch: int) -> list[BucketLine]:
    lines = []
    for index in np.flatnonzero(plan.clips):
        resolution, frames, ratio = plan.bucket.ids[index]
        _, height, width = plan.bucket.get_thw((resolution, frames, ratio))
        batch_size = int(plan.batch_size[index])
        lines.append(
            BucketLine(
                resolution=resolution,
                frames=frames,
                aspect_ratio=ratio,
                height=height,
                width=width,
                clips=int(plan.clips[index]),
                batch_size=batch_size,
                micro_batches=int(batches[index]),
                tokens=batch_size * count_tokens(frames, height, width, patch),
            )
        )
    return lines


def _list_pairs(plan: EpochPlan, batches: np.ndarray) -> list[PairLine]:
    lines = []
    for resolution in plan.bucket.resolutions:
        for entry in resolution.frames:
            if entry.keep_probability > 0:
                part = slice(entry.first_bucket, entry.first_bucket + len(resolution.table.names))
                lines.append(
                    PairLine(
                        resolution=resolution.name,
                        frames=entry.frames,
                        keep_probability=entry.keep_probability,
                        batch_size=entry.batch_size,
                        clips=int(plan.clips[part].sum()),
                        micro_batches=int(batches[part].sum()),
                    )
                )
    return lines


def _count_dropped(plan: EpochPlan, clips: ClipSizes, frame_interval: int) -> dict[str, int]:
    rows = np.flatnonzero(plan.assigned == DROPPED)
    columns = (np.asarray(column)[rows] for column in (clips.num_frames, clips.height, clips.width))
    reasons = find_drop_reasons(*columns, plan.bucket, frame_interval=frame_interval)
    counts = np.bincount(reasons, minlength=len(DROP_REASONS))
    return {reason: int(count) for reason, count in zip(DROP_REASONS, counts, strict=True) if count}


def _list_warnings(
    plan: EpochPlan, batches: np.ndarray, pairs: list[PairLine], steps: int, world_size: int, drop_last: bool
) -> list[str]:
    warnings = []
    lost: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for index in np.flatnonzero((plan.clips > 0) & (batches == 0)):
        lost[plan.bucket.ids[index][:2]].append(int(index))
    for (resolution, frames), indices in lost.items():
        ratios = ", ".join(f"{plan.bucket.ids[index][2]} ({plan.clips[index]})" for index in indices)
        warnings.append(
            f"{_name_pair(resolution, frames)}: batch size {plan.batch_size[indices[0]]} is more than the clips of "
            f"aspect ratio {ratios}: these give no micro-batch ({FILL_HINT})"
        )
    warnings += [f"{_name_pair(pair.resolution, pair.frames)}: no clip" for pair in pairs if pair.clips == 0]
    unused = len(plan) - steps * world_size
    if drop_last and unused > 0:
        warnings.append(f"the last {_count(unused, 'micro-batch')} of the epoch cannot serve {world_size} processes")
    return warnings


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def _name_pair(resolution: str, frames: int) -> str:
    return f"{resolution}, {_count(frames, 'frame')}"


def _format_row(name: str, *cells: object) -> str:
    return f"{name:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (14, 9, 12, 15, 20), strict=True))
