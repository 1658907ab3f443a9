"""Measures the candidate configurations of every kernel on this GPU and writes the fastest of each shape class.

A workload calls one op at a shape of the model. The kernels that it launches, and their shape classes, are those that
ask `configurations.select` meanwhile; each candidate is then forced in turn, its results are compared with those of the
present choice, and it is timed: kernels named `…_backward` over the backward alone, others over the forward. The
candidate with the least time over all workloads of its shape class wins. One that cannot be built or launched, or whose
results differ, costs itself alone; one that hangs ends the process, which says so. What has been measured is kept then,
and when the time is over or the GPU lost; but it does not replace what an earlier run measured over more workloads.

Times are microseconds of one call in bfloat16.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import sys
import threading
import time as clock
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configurations import (
    Configuration,
    force,
    measured_path,
    read_measured,
    read_rows,
    record_selections,
    replace_measured,
)
from .cross_attention import cross_attention
from .gate_residual import gate_residual
from .gate_residual_modulated_norm import gate_residual_modulated_norm
from .gelu_tanh import gelu_tanh
from .layout import PackLayout, TextLayout
from .modulated_norm import modulated_norm
from .spatial_attention import spatial_attention
from .temporal_attention import temporal_attention

CHANNELS, HEADS, HEAD_SIZE, TEXT_TOKENS = 1152, 16, 72, 120
# Videos of one pack as (T, H, W) in tokens: 144p, 240p, 360p, 480p and 720p videos of 16 frames, longer ones, images.
PACKS = {
    "144p": [(16, 9, 16)] * 4,
    "144p large": [(16, 9, 16)] * 20,
    "240p": [(16, 15, 27)] * 6,
    "360p": [(16, 23, 40)] * 3,
    "480p": [(16, 30, 53)] * 2,
    "720p": [(16, 45, 80)],
    "240p, 32 frames": [(32, 15, 27)] * 3,
    "240p, 64 frames": [(64, 15, 27)] * 2,
    "144p, 128 frames": [(128, 9, 16)] * 2,
    "480p images": [(1, 30, 53)] * 24,
}
# Relative to the largest value; a candidate only orders the same sums otherwise.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Workload:
    """One op on one pack. `call` maps `inputs`, which require gradients, to the op's outputs."""

    op: str
    pack: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor | tuple[Tensor, ...]]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return _as_list(self.call(*self.inputs))

    def prepare_backward(self) -> Callable[[], list[Tensor]]:
        outputs = _as_list(self.call(*self.inputs))
        gradients = [torch.ones_like(output) / 64 for output in outputs]
        return lambda: list(torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True))


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def make_workload(
    op: str, pack: str, shapes: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype
) -> Workload:
    """Random inputs of the model's sizes for one op, biases among them as in training; each video has its own row of
    modulation.
    """
    layout = PackLayout.of(shapes, device)
    tokens, rows = layout.num_tokens, layout.modulation_rows(None)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).requires_grad_()

    def table() -> Tensor:
        return draw(layout.num_videos, CHANNELS)

    def stream() -> Tensor:
        return draw(tokens, CHANNELS)

    def norm_weight() -> Tensor:
        # About one, as trained ones are: far larger ones would take the path of the ordinary softmax.
        return (1 + draw(HEAD_SIZE).detach() / 20).requires_grad_()

    def qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return draw(tokens, 3, HEADS, HEAD_SIZE), norm_weight(), norm_weight(), draw(3, HEADS, HEAD_SIZE)

    if op == "modulated_norm":
        inputs = stream(), table(), table()
        call = partial(modulated_norm, frame_rows=rows, layout=layout, backend="triton")
    elif op == "gate_residual":
        inputs = stream(), stream(), table(), draw(CHANNELS)

        def call(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
            return gate_residual(x, branch, gate, rows, layout, bias=bias, backend="triton")

    elif op == "gate_residual_modulated_norm":
        inputs = stream(), stream(), table(), table(), table(), draw(CHANNELS)

        def call(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor) -> tuple:
            return gate_residual_modulated_norm(
                x, branch, gate, shift, scale, rows, layout, bias=bias, backend="triton"
            )

    elif op == "gelu_tanh":
        inputs = draw(tokens, 4 * CHANNELS), draw(4 * CHANNELS)
        call = partial(gelu_tanh, backend="triton")
    elif op == "spatial_attention":
        inputs = qkv()

        def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, bias: Tensor) -> Tensor:
            return spatial_attention(qkv, q_weight, k_weight, layout, qkv_bias=bias, backend="triton")

    elif op == "temporal_attention":
        angles = torch.outer(
            torch.arange(layout.max_frames, device=device, dtype=torch.float32),
            1e4 ** (-torch.arange(0, HEAD_SIZE, 2, device=device) / HEAD_SIZE),
        )
        cos, sin = angles.cos(), angles.sin()
        inputs = qkv()

        def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, bias: Tensor) -> Tensor:
            return temporal_attention(qkv, q_weight, k_weight, cos, sin, layout, qkv_bias=bias, backend="triton")

    elif op == "cross_attention":
        text, _ = TextLayout.from_mask(None, layout.num_videos, TEXT_TOKENS, device)
        inputs = draw(tokens, HEADS, HEAD_SIZE), draw(text.num_tokens, 2, HEADS, HEAD_SIZE), draw(HEADS, HEAD_SIZE)

        def call(q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
            return cross_attention(q, kv, layout, text, q_bias=bias, backend="triton")

    else:
        raise ValueError(f"no workload for op {op!r}; choose one of {', '.join(TUNED_OPS)}")
    return Workload(op, pack, inputs, call)


# Those with the most at stake first.
TUNED_OPS = (
    "spatial_attention",
    "temporal_attention",
    "cross_attention",
    "gate_residual_modulated_norm",
    "gelu_tanh",
    "gate_residual",
    "modulated_norm",
)


CALLS, REPLAYS = 4, 15  # of one CUDA graph, and how often it is timed


def time_on_gpu(function: Callable[[], object]) -> float:
    """Median microseconds of a call among CALLS, one behind the other.

    What norms read of the smallest pack, 42 MB, may lie in the L2 cache from the call before; that of others does not
    fit. As a CUDA graph, for the host's work for a call takes longer than some kernels. `function` must have been
    called before, and all that it does must lie on the current stream, not the default one (autograd runs the backward
    pass on the stream of the forward pass).
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            function()
    times = []
    for _ in range(1 + REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 1e3 * statistics.median(times[1:]) / CALLS


@dataclass(frozen=True)
class Timing:
    """One candidate on one workload; `microseconds` is None where it failed, for the `reason`."""

    op: str
    pack: str
    kernel: str
    shape_class: str
    configuration: Configuration
    microseconds: float | None
    reason: str = ""


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """What is done within may be captured as a CUDA graph; work on the default stream may not."""
    return torch.cuda.stream(torch.cuda.Stream(device))


HANGS_AFTER = 180.0  # seconds, far more than it should take to build, compare and time a candidate


@contextmanager
def end_if_hanging(what: str, seconds: float = HANGS_AFTER) -> Iterator[None]:
    """Ends the process, with a message, when what is done within takes longer: a kernel on a GPU cannot be interrupted.

    The driver ends the kernel with the process.
    """

    def give_up() -> None:
        print(
            f"Error: {what}: not over after {seconds:g} s, so it hangs. What was measured before on other workloads "
            "is kept: take it out of its table, then tune the ops that are left with --op",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure_workload(workload: Workload, time: Callable[[Callable[[], object]], float] = time_on_gpu) -> list[Timing]:
    """Times every candidate of every kernel that the workload launches.

    Where the present choice fails there is nothing to compare with, and no candidate is timed.
    """
    timings = []
    with replace_measured():
        for backward in (False, True):
            expected, failure = [], ""
            present = f"the present choice for {workload.op} on {workload.pack}"
            with record_selections() as selections, end_if_hanging(present):
                try:
                    expected = workload.prepare_backward()() if backward else workload.forward()
                except Exception as error:  # compilers and drivers raise anything; other workloads go on
                    failure = f"not measured, as the present choice fails: {_describe(error)}"
            for (kernel, shape_class), candidates in selections.items():
                if kernel.endswith("_backward") != backward:
                    continue
                for configuration in candidates if len(candidates) > 1 else ():
                    microseconds, reason = None, failure
                    if not failure:
                        candidate = f"{kernel} / {shape_class} on {workload.pack}, {configuration}"
                        with force(kernel, shape_class, configuration), end_if_hanging(candidate):
                            microseconds, reason = _measure(workload, backward, expected, time)
                    timings.append(
                        Timing(workload.op, workload.pack, kernel, shape_class, configuration, microseconds, reason)
                    )
    return timings


def _measure(
    workload: Workload, backward: bool, expected: list[Tensor], time: Callable[[Callable[[], object]], float]
) -> tuple[float | None, str]:
    """(microseconds, "") with the configuration in force, or (None, why not)."""
    try:
        run = workload.prepare_backward() if backward else workload.forward
        reason = _compare(run(), expected)
        return (None, reason) if reason else (time(run), "")
    except Exception as error:  # the candidate loses, and says why
        return None, _describe(error)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def gpu_works() -> bool:
    """False after a kernel that trapped or read beyond its memory: all that follows in this process fails as well."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # torch.AcceleratorError or RuntimeError, by version
        return False
    return True


def _compare(results: list[Tensor], expected: list[Tensor]) -> str:
    """How the results differ from those of the present choice, "" where they agree."""
    for result, right in zip(results, expected, strict=True):
        error = (result.double() - right.double()).abs().max().item()
        limit = TOLERANCE[right.dtype] * right.double().abs().max().item()
        if not error <= limit:
            return f"results differ by {error:.3g} from those of the present choice, allowed {limit:.3g}"
    return ""


def choose_fastest(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row for each (kernel, shape class): the candidate with the least time over all of its workloads.

    A kernel none of whose candidates ran on all of them has no row.
    """
    groups: dict[tuple[str, str], dict[Configuration, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for timing in timings:
        groups[timing.kernel, timing.shape_class][timing.configuration].append(timing.microseconds)
    rows = []
    for (kernel, shape_class), candidates in groups.items():
        totals = {configuration: sum(times) for configuration, times in candidates.items() if None not in times}
        if not totals:
            continue
        best, default = min(totals, key=totals.__getitem__), totals.get(next(iter(candidates)))
        rows.append(
            {
                "kernel": kernel,
                "shape_class": shape_class,
                "configuration": best.choices,
                "microseconds": round(totals[best], 2),
                "default_microseconds": None if default is None else round(default, 2),
                "workloads": len(candidates[best]),
            }
        )
    return rows


def write_timings(timings: Sequence[Timing], path: Path) -> None:
    """Every candidate on every workload as CSV, losers and failures too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Timing)])
    for timing in timings:
        values = (getattr(timing, field.name) for field in fields(Timing))
        writer.writerow(["" if value is None else value for value in values])
    _replace_file(path, text.getvalue())


def _replace_file(path: Path, text: str) -> None:
    """Writes the whole file or leaves what was there: kernels of other processes may read it at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def tune(ops: Sequence[str], device: torch.device, deadline: float | None = None) -> tuple[int, Iterator[list[Timing]]]:
    """Measures the ops on every pack in bf16.

    Args:
        deadline: no workload is begun after it, in seconds since the epoch.

    Returns:
        How many workloads there are, and an iterator over the timings of each.

    Raises:
        ValueError: an op that has no workload, or no CUDA GPU; from the iterator, a GPU that a candidate has left
            unusable, after the timings of its workload.
    """
    for op in ops:
        if op not in TUNED_OPS:
            raise ValueError(f"--op {op}: nothing to tune; choose among {', '.join(TUNED_OPS)}")
    if not torch.cuda.is_available():
        raise ValueError("autotune measures on a CUDA GPU, and torch sees none here")

    def run() -> Iterator[list[Timing]]:
        for op in ops:
            for pack, shapes in PACKS.items():
                if deadline is not None and clock.time() > deadline:
                    return
                with own_stream(device):
                    timings = measure_workload(make_workload(op, pack, shapes, device, torch.bfloat16))
                yield timings
                if not gpu_works():
                    failed = next((timing for timing in timings if timing.reason), None)
                    raise ValueError(
                        f"the GPU cannot be used any more, likely since {failed}; what was measured is kept: take that "
                        "candidate out, then tune the ops that are left with --op"
                    )
                torch.cuda.empty_cache()

    return len(ops) * len(PACKS), run()


def write_measured(
    timings: Sequence[Timing], gpu: str, about: dict[str, str], path: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Writes what `choose_fastest` chooses to `path`, by default the file that `select` reads.

    A row that is there already stays where these timings give none for its kernel and shape class, and where it was
    measured over more workloads, unless its configuration is no candidate any more. (Rows hold the sum over workloads,
    so those of two runs cannot be put together.) Each row says of itself what is `about` it: versions, commit and date.

    Returns:
        The path, and the earlier rows that stay though these timings give another.
    """
    path = path or measured_path(gpu)
    named = read_rows(path)
    candidates = {(timing.kernel, timing.shape_class, str(timing.configuration)) for timing in timings}
    stay = []
    for row in choose_fastest(timings):
        key = row["kernel"], row["shape_class"]
        before = named.get(key)
        if before is not None and before["workloads"] > row["workloads"]:
            if (*key, str(Configuration(**before["configuration"]))) in candidates:
                stay.append(before)
                continue
        named[key] = {**row, **about}
    lines = ",\n".join(json.dumps(row) for _, row in sorted(named.items()))
    _replace_file(path, f'{{"gpu": {json.dumps(gpu)}, "rows": [\n{lines}\n]}}\n')
    read_measured.cache_clear()
    return path, stay
