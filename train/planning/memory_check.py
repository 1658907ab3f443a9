"""Whether the micro-batches of a configuration fit into a GPU's memory, and what to do where they do not, or where
there is room for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from opensora_fast.config import TrainConfig
from opensora_fast.costs.memory import RESERVE, MemoryModel, usable_memory
from opensora_fast.train.costs import RunCosts
from opensora_fast.train.inputs.data import TrainingData
from opensora_fast.train.step.graphs import SUGGESTED_TOKENS

GIB = 2**30
SHOWN = 5


@dataclass(frozen=True)
class BucketMemory:
    """The memory of one (resolution, frames) pair, at its aspect ratio with the most tokens.

    Attributes:
        tokens: of a micro-batch.
        peak: bytes that a step needs.
        fits: whether they are there.
        largest_batch: clips that fit with as many recomputed blocks as configured; 0 if not one does.
        largest_batch_recomputing: clips that fit if all blocks recompute; 0 if not one does.
        fewest_recomputed: recomputed blocks with which the configured batch size fits; None if it never does.
    """

    resolution: str
    frames: int
    aspect_ratio: str
    batch_size: int
    tokens: int
    peak: int
    fits: bool
    largest_batch: int
    largest_batch_recomputing: int
    fewest_recomputed: int | None

    @property
    def key(self) -> str:
        """Where the configuration has its batch size."""
        return f"bucket_config[{self.resolution!r}][{self.frames}]"

    def describe_misfit(self, memory: int) -> str:
        """A sentence that says what does not fit into a GPU of so many bytes, and the fix."""
        fixes = []
        if self.largest_batch:
            fixes.append(f"lower the batch size to {self.largest_batch}")
        if self.fewest_recomputed is not None:
            fixes.append(f"set grad_checkpoint={self.fewest_recomputed}")
        if not fixes and self.largest_batch_recomputing:
            fixes.append(f"lower the batch size to {self.largest_batch_recomputing} with grad_checkpoint=True")
        if not fixes:
            fixes.append("remove it: one clip is too much even with grad_checkpoint=True")
        usable = usable_memory(memory)
        return (
            f"{self.key}: batch size {self.batch_size} needs {self.peak / GIB:.1f} GiB (counted), the GPU has "
            f"{usable / GIB:.1f} GiB without a reserve of {100 * RESERVE:.0f} %: {', or '.join(fixes)}"
        )


def count_buckets(
    costs: RunCosts, model: MemoryModel, memory: int, pairs: Collection[tuple[str, int]] | None = None
) -> list[BucketMemory]:
    """The memory of every (resolution, frames) pair that keeps clips, on a GPU of so many bytes.

    Args:
        pairs: only these, for example those for which there are clips.
    """
    found = []
    usable = usable_memory(memory)
    for resolution in costs.bucket.resolutions:
        for entry in resolution.frames:
            if entry.keep_probability == 0 or (pairs is not None and (resolution.name, entry.frames) not in pairs):
                continue
            bucket_id = costs.get_largest(resolution, entry)
            videos = costs.get_videos(bucket_id)
            peak = model.peak(videos, costs.recomputed)
            found.append(
                BucketMemory(
                    resolution=resolution.name,
                    frames=entry.frames,
                    aspect_ratio=bucket_id[2],
                    batch_size=videos.batch,
                    tokens=videos.tokens,
                    peak=peak,
                    fits=peak <= usable,
                    largest_batch=model.largest_batch(videos, costs.recomputed, usable),
                    largest_batch_recomputing=model.largest_batch(videos, costs.model.depth, usable),
                    fewest_recomputed=model.fewest_recomputed(videos, usable),
                )
            )
    return found


@dataclass(frozen=True)
class GraphAdvice:
    """What replaying small steps as CUDA graphs would take, where the configuration does not ask for it.

    Attributes:
        tokens: for `cuda_graph_tokens`.
        small: (resolution, frames) pairs whose micro-batches have no more tokens.
        pairs: all of them.
        memory: bytes that the graphs would hold.
        fits: whether every pair fits beside them.
        processes: of the run.
    """

    tokens: int
    small: int
    pairs: int
    memory: int
    fits: bool
    processes: int

    def describe(self) -> str:
        """A sentence for a person."""
        together = "; a step is faster where all processes replay theirs" if self.processes > 1 else ""
        room = "every bucket fits beside them" if self.fits else "not every bucket fits beside them"
        return (
            f"cuda_graph_tokens={self.tokens} would replay small steps, which may wait for the host, as CUDA graphs "
            "(on an H200 those of 13 k tokens were 1.75 times as fast): "
            f"{self.small} of {self.pairs} buckets{together}. "
            f"The graphs would hold {self.memory / GIB:.1f} GiB (counted): {room}"
        )


def advise_on_graphs(
    costs: RunCosts, model: MemoryModel, buckets: Collection[BucketMemory], memory: int
) -> GraphAdvice | None:
    """What CUDA graphs would take on a GPU of so many bytes; None if they are configured, cannot be, or serve nothing.

    Args:
        model: of the configuration.
        buckets: counted with it.
    """
    small = sum(bucket.tokens <= SUGGESTED_TOKENS for bucket in buckets)
    if not small or costs.config.cuda_graph_tokens or costs.config.sp_size > 1:
        return None
    config = costs.config.model_copy(update={"cuda_graph_tokens": SUGGESTED_TOKENS})
    graphed = replace(costs, config=config).get_memory_model(model.processes)
    held = replace(graphed, activation_factor=model.activation_factor).graphs(costs.recomputed)
    fits = max(bucket.peak for bucket in buckets) + held <= usable_memory(memory)
    return GraphAdvice(SUGGESTED_TOKENS, small, len(buckets), held, fits, model.processes)


def warn_of_memory(
    config: TrainConfig,
    data: TrainingData,
    world_size: int,
    device: torch.device,
    report: Callable[[str], None],
    linear: str = "torch",
) -> None:
    """Before step 0 on a GPU, with all that stands already allocated: warn of buckets that will not fit, or tell of
    room for CUDA graphs. `linear`: see `RunCosts`."""
    if device.type != "cuda":
        return
    costs = RunCosts(config, data.bucket, linear)
    model = costs.get_memory_model(world_size)
    # What is allocated is known better than counted: model, optimizer, average and encoders.
    model = replace(model, encoders=torch.cuda.memory_allocated(device) - model.weights - model.optimizer)
    memory = torch.cuda.get_device_properties(device).total_memory
    pairs = {(line.resolution, line.frames) for line in data.explanation.buckets if line.micro_batches}
    buckets = count_buckets(costs, model, memory, pairs)
    misfits = [line for line in buckets if not line.fits]
    for line in misfits[:SHOWN]:
        report(f"warning: {line.describe_misfit(memory)}")
    if misfits and model.graphed is not None:
        graphs = model.graphs(costs.recomputed) / GIB
        report(f"warning: {graphs:.1f} GiB of each are held by CUDA graphs (counted); cuda_graph_tokens=0 needs none")
    if len(misfits) > SHOWN:
        report(f"warning: and {len(misfits) - SHOWN} more buckets; `opensora-fast plan` lists them")
    advice = advise_on_graphs(costs, model, buckets, memory)
    if advice is not None and advice.fits:
        report(f"note: {advice.describe()}")
