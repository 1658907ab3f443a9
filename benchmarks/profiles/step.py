"""Where the time of a training step goes: every kernel that ran on the GPU, under the op that launched it.

On a CPU, where ops launch nothing, it is the ops' own time. Profiling slows the host down, so the time of the step
itself is measured before, without it.
"""

from __future__ import annotations

import csv
import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from opensora_fast.device import count_memory_retries

from ..measuring.timing import Call
from ..providers.model_work import Training, make_model_work, make_training
from ..providers.models import model_provider, training_call
from ..providers.variants import VARIANT_OF
from ..shapes import Workload
from ..suites.scale import Scale

WARM_UP, TIMED, PROFILED = 3, 10, 3
SHOWN = 60  # kernels, of those that a file holds
# The profiler's own, where the host had to wait for room in the queue: their kernels stand under an op as well.
ANNOTATIONS = ("Command Buffer Full",)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")  # shown by the sizes of their operands


@dataclass(frozen=True)
class KernelTime:
    """Launches of one kernel by one op on operands of one size, in one step.

    Attributes:
        op: that launched it, such as "aten::mm" or "opensora_fast::gelu_tanh_forward".
        kernel: its name in the machine code; of the op on a CPU.
        sizes: of the operands of matrix products, else "".
        launches: in a step.
        microseconds: of all of them.
    """

    op: str
    kernel: str
    sizes: str
    launches: float
    microseconds: float


@dataclass(frozen=True)
class StepProfile:
    """One step.

    Attributes:
        provider: a name of `providers/variants.py`.
        milliseconds: of a step, host included, mean of `TIMED` steps without a pause or a profiler.
        memory_retries: how often torch found no room meanwhile, and waited to give memory back; see
            `count_memory_retries`.
        kernels: the longest first.
    """

    workload: Workload
    provider: str
    milliseconds: float
    memory_retries: int
    kernels: tuple[KernelTime, ...]

    @property
    def busy_milliseconds(self) -> float:
        """Of all kernels; what is missing of a step are gaps between them."""
        return sum(kernel.microseconds for kernel in self.kernels) / 1e3


def profile_steps(workloads: Sequence[Workload], provider: str, scale: Scale) -> Iterator[StepProfile]:
    """Trains one model with random weights for a few steps of each workload and profiles some of them.

    Args:
        provider: a name of `providers/variants.py`; "ours" and "compile" recompute as few blocks as the memory allows.
        scale: its model, dtype and device.

    Raises:
        ValueError: an unknown provider, or one that does not run here.
    """
    if provider not in VARIANT_OF:
        raise ValueError(f"provider {provider!r} is unknown; known: {', '.join(VARIANT_OF)}")
    training = make_training(scale.config, scale.device, scale.dtype)
    for workload in workloads:
        # What the profiler noted of the workload before, hundreds of thousands of objects, else goes within the steps
        # that are timed: that takes most of a second.
        gc.collect()
        fitting = scale.least_recomputing(provider, workload.tokens) if provider in ("ours", "compile") else provider
        yield _profile_step(workload, fitting, scale, training)


def _profile_step(workload: Workload, provider: str, scale: Scale, training: Training) -> StepProfile:
    work = make_model_work(training.model, workload, scale.text, training)
    known = model_provider(VARIANT_OF[provider])
    reason = known.missing(work)
    if reason:
        raise ValueError(f"provider {provider} does not run here: {reason}; name another, such as --provider eager")
    call = training_call(known.prepare(work), work)
    for _ in range(WARM_UP):
        call()
    device = torch.device(scale.device)
    before = count_memory_retries(device)
    milliseconds = _mean_milliseconds(call, scale.device)
    retries = count_memory_retries(device) - before
    return StepProfile(workload, provider, milliseconds, retries, _profile(call, scale.device))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _mean_milliseconds(call: Call, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED):
        call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start) / TIMED


def _profile(call: Call, device: str) -> tuple[KernelTime, ...]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(PROFILED):
            call()
        _synchronize(device)
    return collect_kernels(profiler.events(), device)


def collect_kernels(events: Iterable[Any], device: str) -> tuple[KernelTime, ...]:
    """What the events of PROFILED steps say of one, each kernel under the op that launched it."""
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.name in ANNOTATIONS:
            continue
        sizes = _format_sizes(event.input_shapes) if event.name in PRODUCTS else ""
        if device == "cuda":
            for kernel in event.kernels:
                times[event.name, kernel.name, sizes].append(kernel.duration)
        else:
            times[event.name, event.name, sizes].append(event.self_cpu_time_total)
    rows = [KernelTime(*key, len(found) / PROFILED, sum(found) / PROFILED) for key, found in times.items()]
    return tuple(sorted(rows, key=lambda row: -row.microseconds))


def _format_sizes(shapes: Sequence[Sequence[int]]) -> str:
    return " @ ".join("×".join(map(str, shape)) for shape in shapes if shape)


def format_profile(profile: StepProfile) -> str:
    """A line for each of the longest kernels: share of the step, ns for each token, launches."""
    tokens, step = profile.workload.tokens, profile.milliseconds
    text = [
        f"{profile.workload.name}, {profile.provider}, {tokens} tokens: {step:.2f} ms a step, "
        f"{tokens / step:.1f} k tokens/s, kernels {profile.busy_milliseconds:.2f} ms"
    ]
    if profile.memory_retries:
        text.append(
            f"{profile.memory_retries} times in {TIMED} steps torch found no room and waited to give memory back. The "
            "time of a step has that in it: profile this one alone, or with PYTORCH_ALLOC_CONF=expandable_segments:True"
        )
    for row in profile.kernels[:SHOWN]:
        share, nanoseconds = row.microseconds / 10 / step, 1e3 * row.microseconds / tokens
        name = row.op if row.kernel == row.op else f"{row.op} {row.kernel[:60]}"
        text.append(f"{share:5.1f} % {nanoseconds:8.1f} ns {row.launches:7.1f} × {name} {row.sizes}".rstrip())
    return "\n".join(text)


def write_profile(profile: StepProfile, path: Path) -> None:
    """One line of CSV for each kernel."""
    names = [field.name for field in fields(KernelTime)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["workload", "batch", "tokens", "step_ms", *names])
        for row in profile.kernels:
            own = [getattr(row, name) for name in names]
            known = [profile.workload.name, profile.workload.batch, profile.workload.tokens]
            writer.writerow([*known, f"{profile.milliseconds:.3f}", *own[:-2], f"{own[-2]:g}", f"{own[-1]:.1f}"])
