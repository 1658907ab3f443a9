"""What a run on several GPUs will take: memory of every bucket, time of its steps, waiting, and tokens per second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from opensora_fast.costs.idle import idle_share, slowest_of_each_step
from opensora_fast.costs.memory import RESERVE, MemoryModel, usable_memory
from opensora_fast.costs.step_time import StepTime
from opensora_fast.data.buckets.balance import balance
from opensora_fast.data.buckets.plan import count_steps
from opensora_fast.parallel.join import count_replicas
from opensora_fast.train.costs import RunCosts
from opensora_fast.train.planning.memory_check import GIB, BucketMemory, GraphAdvice, advise_on_graphs, count_buckets
from opensora_fast.train.planning.mix import Mix

NOT_IN_TIMES = "times are of the model alone; not in them: communication between GPUs, encoding, loading, checkpoints"

FLOAT32_NOTE = "the rates are those of bfloat16; products of float32 (dtype=fp32) reach a half of them at most"


@dataclass(frozen=True)
class BucketPlan:
    """One (resolution, frames) pair: its memory, and the time of a step on one micro-batch in seconds."""

    memory: BucketMemory
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.memory.tokens / self.seconds


@dataclass(frozen=True)
class Order:
    """An epoch's micro-batches in one order.

    Attributes:
        balanced: whether it is that of `balance=True`.
        idle: share of all processes' time that is spent waiting for the slowest.
        tokens_per_s: of the cluster.
        epoch_seconds: where the length of an epoch is known.
    """

    balanced: bool
    idle: float
    tokens_per_s: float
    epoch_seconds: float | None


@dataclass(frozen=True)
class ClusterPlan:
    """A configuration on `world_size` GPUs.

    Attributes:
        name: of the configuration.
        world_size: processes, one a GPU.
        time: the model of a step's time.
        gpu_note: how the GPU was chosen, "" where it was named.
        memory_model: of a process; `memory_rows` measured steps stand behind its activations.
        encoders: what of the encoders is in the memory.
        recomputed: blocks that recompute as configured.
        buckets: pairs that keep clips, largest resolution and longest first.
        graph_advice: what CUDA graphs would take, where they are not configured and some steps are small.
        mix: where the micro-batches come from; `steps` of an epoch if known.
        orders: shuffled, and balanced.
        is_balanced: whether the configuration balances.
        notes: what a reader must know besides.
    """

    name: str
    world_size: int
    time: StepTime
    gpu_note: str
    memory_model: MemoryModel
    memory_rows: int
    encoders: str
    recomputed: int
    buckets: list[BucketPlan]
    graph_advice: GraphAdvice | None
    mix: str
    steps: int | None
    orders: list[Order]
    is_balanced: bool
    notes: list[str]

    @property
    def warnings(self) -> list[str]:
        """What does not fit, and the fix."""
        memory = self.time.gpu.memory
        return [bucket.memory.describe_misfit(memory) for bucket in self.buckets if not bucket.memory.fits]

    @property
    def fewest_recomputed(self) -> int | None:
        """The fewest recomputed blocks with which every bucket fits; None if one never does."""
        fewest = [bucket.memory.fewest_recomputed for bucket in self.buckets]
        return None if None in fewest else max(fewest)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        gpu = self.time.gpu
        model = self.memory_model
        return {
            "config": self.name,
            "world_size": self.world_size,
            "gpu": asdict(gpu) | {"usable_memory": usable_memory(gpu.memory), "note": self.gpu_note},
            "times": {
                "basis": self.time.basis,
                "matrix": self.time.matrix,
                "bandwidth": self.time.bandwidth,
                "constant_seconds": self.time.constant,
                "rows": self.time.rows,
                "worst_residual": self.time.worst_residual,
                "not_counted": NOT_IN_TIMES,
            },
            "memory": {
                "basis": self._memory_basis,
                "weights": model.weights,
                "optimizer": model.optimizer,
                "encoders": model.encoders,
                "graphs": model.graphs(self.recomputed),
                "linear": model.linear,
                "about_encoders": self.encoders,
                "recomputed_blocks": self.recomputed,
                "fewest_recomputed_blocks": self.fewest_recomputed,
            },
            "buckets": [
                {"key": line.memory.key}
                | asdict(line.memory)
                | {"seconds": line.seconds, "tokens_per_s": line.tokens_per_s}
                for line in self.buckets
            ],
            "graph_advice": self.graph_advice and asdict(self.graph_advice),
            "mix": self.mix,
            "steps_per_epoch": self.steps,
            "projections": [asdict(order) for order in self.orders],
            "balance": self.is_balanced,
            "warnings": self.warnings,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """The same as text for a person. Every line with a time says what it rests on."""
        gpu, model, basis = self.time.gpu, self.memory_model, self.time.basis
        shared = f": 1/{self.world_size} of it" if self.world_size > 1 else ""
        together = self.memory_model.sharing
        lines = [
            f"{self.name} on {self.world_size} × {gpu.name}{self.gpu_note and f' ({self.gpu_note})'}",
            f"times: {basis}"
            + ("" if self.time.rows else f"; a limit that nothing reaches: rates of its {gpu.source}"),
            f"memory: {self._memory_basis}; a GPU has {gpu.memory / GIB:.1f} GiB, "
            f"{usable_memory(gpu.memory) / GIB:.1f} without a reserve of {100 * RESERVE:.0f} % (assumed)",
            f"standing: {model.standing / GIB:.1f} GiB (weights {model.weights / GIB:.1f}, optimizer and average "
            f"{model.optimizer / GIB:.1f}{shared}, encoders {model.encoders / GIB:.1f})",
            f"{self.recomputed} of {model.config.depth} blocks recompute; captions are taken to have all {model.text} "
            "tokens that they may have",
            self.encoders,
            *(["quack multiplies in the Linears; times are those of cuBLAS"] if model.linear == "quack" else []),
            *([f"each micro-batch is computed by {together} processes together (sp_size)"] if together > 1 else []),
            *self._describe_graphs(),
            "",
            _format_row(
                "bucket", "tokens", "batch size", "GiB", "largest", "recompute", "ms a step", "k tokens/s", "times are"
            ),
        ]
        lines += [self._format_bucket(bucket) for bucket in self.buckets]
        lines += [
            "bucket: at its aspect ratio with the most tokens; GiB: of a process at most, ! where that does not fit;",
            "largest: batch size that fits as configured; recompute: the least grad_checkpoint that makes it fit",
            *(f"warning: {warning}" for warning in self.warnings),
            self._advise_on_recomputing(),
            *([] if self.graph_advice is None else [self.graph_advice.describe()]),
            "",
            f"micro-batches: {self.mix}"
            + ("" if self.steps is None else f": {self.steps} step{'s' * (self.steps != 1)} an epoch"),
            *(self._format_order(order) for order in self.orders),
            NOT_IN_TIMES,
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _describe_graphs(self) -> list[str]:
        graphed = self.memory_model.graphed
        if graphed is None:
            return []
        held = self.memory_model.graphs(self.recomputed) / GIB
        return [
            f"CUDA graphs of up to {graphed.tokens} tokens hold {held:.1f} GiB beside every step; times are of steps "
            "that are not replayed"
        ]

    def _advise_on_recomputing(self) -> str:
        configured = f"grad_checkpoint is {self.recomputed}"
        if self.fewest_recomputed is None:
            return f"no number of recomputed blocks makes every bucket fit; {configured}"
        return f"every bucket fits with grad_checkpoint={self.fewest_recomputed} or more; {configured}"

    @property
    def _memory_basis(self) -> str:
        if not self.memory_rows:
            return "counted, not measured"
        factor = self.memory_model.activation_factor
        return f"activations {factor:.2f} × the counted ones, the most that {self.memory_rows} rows measured"

    @property
    def _short_basis(self) -> str:
        return "fitted" if self.time.rows else "counted, not measured"

    def _format_bucket(self, bucket: BucketPlan) -> str:
        memory = bucket.memory
        return _format_row(
            f"{memory.resolution}, {memory.frames} frame{'s' * (memory.frames > 1)}, {memory.aspect_ratio}",
            memory.tokens,
            memory.batch_size,
            f"{memory.peak / GIB:.1f}{'' if memory.fits else ' !'}",
            memory.largest_batch,
            "never fits" if memory.fewest_recomputed is None else memory.fewest_recomputed,
            f"{1e3 * bucket.seconds:.0f}",
            f"{bucket.tokens_per_s / 1e3:.1f}",
            self._short_basis,
        )

    def _format_order(self, order: Order) -> str:
        used = " (as configured)" if order.balanced == self.is_balanced else ""
        epoch = "" if order.epoch_seconds is None else f", {_format_duration(order.epoch_seconds)} an epoch"
        return (
            f"balance={order.balanced}{used}: {100 * order.idle:.1f} % of the GPUs' time is waiting for the slowest; "
            f"projection {order.tokens_per_s / 1e6:.2f} M tokens/s on all GPUs{epoch} ({self._short_basis})"
        )


def make_plan(
    costs: RunCosts,
    name: str,
    world_size: int,
    time: StepTime,
    mix: Mix,
    *,
    gpu_note: str = "",
    memory_ratios: list[float] | None = None,
    notes: list[str] | None = None,
) -> ClusterPlan:
    """Plan a run.

    Args:
        costs: of the configuration.
        name: of it.
        world_size: processes, one a GPU.
        time: of a step on the GPU.
        mix: the micro-batches of an epoch.
        gpu_note: how the GPU was chosen, "" where it was named.
        memory_ratios: measured over counted memory of activations; the largest is taken.
        notes: what a reader must know besides.
    """
    ratios = memory_ratios or []
    model = costs.get_memory_model(world_size)
    if ratios:
        model = replace(model, activation_factor=max(ratios))
    buckets, lines = [], count_buckets(costs, model, time.gpu.memory)
    for line in lines:
        videos = costs.get_videos((line.resolution, line.frames, line.aspect_ratio))
        buckets.append(BucketPlan(line, time.seconds(costs.count_step(videos, world_size))))
    return ClusterPlan(
        name=name,
        world_size=world_size,
        time=time,
        gpu_note=gpu_note,
        memory_model=model,
        memory_rows=len(ratios),
        encoders=costs.describe_encoders(),
        recomputed=costs.recomputed,
        buckets=buckets,
        graph_advice=advise_on_graphs(costs, model, lines, time.gpu.memory),
        mix=mix.source,
        steps=mix.steps,
        orders=project_orders(costs, world_size, time, mix),
        is_balanced=costs.config.balance,
        notes=[*(notes or []), *([FLOAT32_NOTE] if costs.element == 4 and not time.rows else [])],
    )


def project_orders(costs: RunCosts, world_size: int, time: StepTime, mix: Mix) -> list[Order]:
    """The shuffled order of a mix and the balanced one."""
    replicas = count_replicas(world_size, costs.config.sp_size)
    videos = [costs.get_videos(bucket_id) for bucket_id in costs.bucket.ids]
    seconds = np.array([time.seconds(costs.count_step(part, world_size)) for part in videos])
    tokens = np.array([part.tokens for part in videos])
    balanced = mix.bucket_of[balance(costs.get_order_costs()[mix.bucket_of], costs.config.seed, epoch=0)]
    steps = mix.steps or max(1, count_steps(len(mix.bucket_of), replicas, drop_last=True))
    orders = []
    for bucket_of in (mix.bucket_of, balanced):
        taken = np.resize(bucket_of, steps * replicas)  # from the front again where the last step is not full
        slowest = slowest_of_each_step(seconds[taken], replicas)
        orders.append(
            Order(
                balanced=bucket_of is balanced,
                idle=idle_share(seconds[taken], replicas),
                tokens_per_s=float(tokens[taken].sum() / slowest.sum()),
                epoch_seconds=None if mix.steps is None else float(slowest.sum()),
            )
        )
    return orders


def _format_row(name: str, *cells: object) -> str:
    widths = (9, 12, 9, 9, 11, 11, 12, 22)
    return f"{name:<24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _format_duration(seconds: float) -> str:
    unit, size = next((part for part in (("hours", 3600), ("minutes", 60)) if seconds >= part[1]), ("seconds", 1))
    return f"{seconds / size:.3g} {unit}"
