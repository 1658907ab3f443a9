"""Times implementations of the same work against each other, interleaved, with cold caches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Written between samples; larger than the L2 of any GPU so far (B200: 126 MB).
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Times:
    """Sorted times of one implementation in milliseconds."""

    milliseconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Nearest-rank percentile."""
        index = round(percent / 100 * (len(self.milliseconds) - 1))
        return self.milliseconds[index]


def time_interleaved(
    calls: dict[str, Callable[[], object]], device: str, budget_s: float, min_samples: int = 30, warm_up: int = 3
) -> dict[str, Times]:
    """Times `calls` in turn, one sample of each per round, so that drifting clocks touch all alike.

    Args:
        calls: implementation → call; each already works.
        device: "cuda" (events, L2 flushed before each sample) or "cpu" (wall clock).
        budget_s: rounds stop when it is used up, but not before three.
        min_samples: rounds stop no earlier than this while the budget lasts.
        warm_up: calls before the first sample.

    Returns:
        implementation → its times. Fewer than `min_samples` says that the budget was short.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    take = _cuda_sampler() if device == "cuda" else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < 3 or time.perf_counter() - start < budget_s:
            for name, call in calls.items():
                samples[name].append(take(call))
            rounds += 1
            if rounds >= min_samples and time.perf_counter() - start > budget_s / 4:
                break
    finally:
        if enabled:
            gc.enable()
    return {name: Times(tuple(sorted(values))) for name, values in samples.items()}


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that `call` allocates at its peak beyond what was there before; 0 on the CPU, where nothing counts it."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_sampler() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def sample(call: Callable[[], object]) -> float:
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return sample
