"""Times implementations of the same work against each other, interleaved, with cold caches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Written between samples; larger than the L2 of any GPU so far (B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
FEWEST_ROUNDS = 3
ALL_OF_THE_BUDGET = 10**9  # so many `min_samples` that none ends the sampling before its budget does

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Sorted times of one implementation in milliseconds, and when they were taken.

    Attributes:
        milliseconds: of the samples.
        turns: (begin, end) of the samples of each turn, as `time.time()`.
    """

    milliseconds: tuple[float, ...]
    turns: tuple[tuple[float, float], ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def percentile(self, percent: float) -> float:
        """Nearest-rank percentile."""
        index = round(percent / 100 * (len(self.milliseconds) - 1))
        return self.milliseconds[index]


class SamplingStopped(KeyboardInterrupt):
    """Someone stopped the sampling; `times` are of the implementations that had samples enough by then."""

    def __init__(self, times: dict[str, Times]):
        super().__init__()
        self.times = times


@dataclass(frozen=True)
class Sampling:
    """How samples are taken.

    Attributes:
        budget_s: rounds stop when it is used up, but not before FEWEST_ROUNDS.
        min_samples: while the budget lasts, rounds go on at least to this many samples.
        warm_up: calls of each implementation before its first sample; fewer where they use up the budget.
        samples_per_turn: samples of one implementation before it is the next one's turn.
        large: implementations that each fill the GPU's memory: a turn begins by giving back what the one before held,
            and with one call that is not counted.
        watched: samples so long that clocks and power are read while they are taken.
    """

    budget_s: float
    min_samples: int = 30
    warm_up: int = 3
    samples_per_turn: int = 1
    large: bool = False
    watched: bool = False


def time_interleaved(
    calls: Mapping[str, Call],
    device: str,
    sampling: Sampling,
    beat: Callable[[], None] = lambda: None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """Times `calls` in turn, so that drifting clocks touch all alike.

    Args:
        calls: implementation → call; each already works.
        device: "cuda" (events, L2 flushed before each sample) or "cpu" (wall clock).
        sampling: how many samples, and when to stop.
        beat: called between samples, to say that the process is alive.
        failed: told of an implementation that raises, which takes no further part; None: its error passes through.

    Returns:
        implementation → its times. Fewer than `min_samples` says that the budget was short.

    Raises:
        SamplingStopped: for a KeyboardInterrupt.
    """
    take = _cuda_sampler() if device == "cuda" else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}

    def attempt(name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
            return
        except Exception as caught:
            if failed is None:
                raise
            error = caught.with_traceback(None)  # its frames hold tensors
        del samples[name]
        failed(name, error)

    def warm_up(name: str) -> None:
        start = time.perf_counter()
        for _ in range(sampling.warm_up):
            calls[name]()
            if time.perf_counter() - start > sampling.budget_s:
                break

    def take_turn(name: str) -> None:
        if sampling.large:
            release_memory(device)
            calls[name]()
        begin = time.time()
        for _ in range(sampling.samples_per_turn):
            samples[name].append(take(calls[name]))
        turns[name].append((begin, time.time()))

    if not sampling.large:
        for name in calls:
            attempt(name, warm_up)
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while samples and (rounds < FEWEST_ROUNDS or time.perf_counter() - start < sampling.budget_s):
            for name in list(samples):
                attempt(name, take_turn)
                beat()
            rounds += 1
            enough = rounds * sampling.samples_per_turn >= sampling.min_samples
            if enough and time.perf_counter() - start > sampling.budget_s / 4:
                break
    except KeyboardInterrupt:
        raise SamplingStopped(_times(samples, turns, FEWEST_ROUNDS)) from None
    finally:
        if enabled:
            gc.enable()
    return _times(samples, turns)


def _times(
    samples: Mapping[str, list[float]], turns: Mapping[str, list[tuple[float, float]]], fewest: int = 1
) -> dict[str, Times]:
    return {
        name: Times(tuple(sorted(values)), tuple(turns[name]))
        for name, values in samples.items()
        if len(values) >= fewest
    }


def peak_memory(call: Call, device: str, total: bool = False) -> int:
    """Bytes that `call` allocates at its peak beyond what was there before; 0 on the CPU, which counts none.

    Args:
        total: include what was there before.
    """
    if device != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    before = 0 if total else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release_memory(device: str) -> None:
    """Gives the GPU back what nothing refers to any more; nothing to do on the CPU."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _cpu_sample(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_sampler() -> Callable[[Call], float]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def sample(call: Call) -> float:
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return sample
