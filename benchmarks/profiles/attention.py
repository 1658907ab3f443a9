"""`opensora-fast profile attention`: time of each implementation over the attended length, with its error beside it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..measuring.contest import FORWARD, FORWARD_BACKWARD, forward_backward_call
from ..measuring.provider import choose_providers
from ..measuring.session import DeviceLostError, Session, threads_of
from ..providers.attention import ATTENTION_PROVIDERS
from ..providers.attention_work import KINDS, make_attention_work
from ..report.summary import format_reasons
from ..rows import Row, append_rows
from ..running.runner import Report, run_cases
from ..suites.attention_lengths import DEFAULT_LENGTHS, SIZES, length_case
from ..suites.ceilings import measure_ceilings
from ..suites.scale import scale_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACED_CALLS = 3


def profile_attention(
    kind: str,
    lengths: Sequence[int] | None,
    providers: Sequence[str] | None,
    device: str,
    out: Path,
    budget_s: float,
) -> Report:
    """Measures forward, and forward with backward, of every provider at every length, and writes rows and plot.

    What was measured is written even where a length or a provider stops the run.

    Args:
        kind: "spatial", "temporal" or "cross".
        lengths: attended lengths; None: those of the device.
        providers: names from `ATTENTION_PROVIDERS`; None: all.
        device: "cuda" (in bfloat16) or "cpu" (in float32).
        out: folder of the files, see `profile_paths`.
        budget_s: time for all samples together, but for the fewest of each provider; its check comes on top.

    Raises:
        ValueError: an unknown kind or provider, a length below 1, or a provider that left the GPU unusable.
    """
    chosen = tuple(provider.name for provider in choose_providers(ATTENTION_PROVIDERS, providers))
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    lengths = tuple(dict.fromkeys(lengths)) if lengths else DEFAULT_LENGTHS[kind, device]
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths {list(lengths)}: each must be at least 1")
    out.mkdir(parents=True, exist_ok=True)  # a place where nothing can be written costs no measurement
    dtype = scale_of(device).dtype
    seconds = budget_s / len(lengths) / 2
    cases = [replace(length_case(kind, length, device, dtype, seconds, 0.0), providers=chosen) for length in lengths]
    session, report = Session(device), Report()
    try:
        with threads_of(device):
            measure_ceilings(session)
            run_cases(cases, session, report=report)
    except DeviceLostError as error:
        names = ", ".join(dict.fromkeys(row.provider for row in error.rows)) or "a provider"
        raise ValueError(f"{names} left the GPU unusable: {error}; leave it out of --providers") from error
    finally:
        if report.rows or report.refused:
            _write_profile(report.rows, kind, out)
    return report


def profile_paths(kind: str, out: Path) -> tuple[Path, Path]:
    """(rows as CSV, plot as SVG, which takes matplotlib)."""
    return out / f"attention_{kind}.csv", out / f"attention_{kind}.svg"


def trace_attention(rows: Sequence[Row], kind: str, length: int, device: str, out: Path) -> list[Path]:
    """Writes a trace of forward and backward of each provider that has a time at a length, for https://ui.perfetto.dev.

    Returns:
        The files, one for each provider.
    """
    from torch.profiler import ProfilerActivity, profile

    heads, head_size, tokens = SIZES[device]
    work = make_attention_work(kind, length, device, scale_of(device).dtype, tokens, heads, head_size)
    measured = {row.provider for row in rows if row.status == "ok" and row.workload == f"length {length}"}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    paths = []
    for provider in ATTENTION_PROVIDERS:
        if provider.name not in measured:
            continue
        call = forward_backward_call(provider.prepare(work), work)
        call()
        with profile(activities=activities) as profiler:
            for _ in range(TRACED_CALLS):
                call()
        paths.append(out / f"trace_{kind}_{length}_{provider.name}.json")
        profiler.export_chrome_trace(str(paths[-1]))
    return paths


def plot_attention(rows: Sequence[Row], kind: str) -> Figure:
    """Milliseconds over length, one line per provider, forward and forward+backward side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, direction in zip(axes, (FORWARD, FORWARD_BACKWARD), strict=True):
        for provider in dict.fromkeys(row.provider for row in rows):
            points = [
                (int(row.workload.split()[-1]), row.p50_ms)
                for row in rows
                if row.provider == provider and row.direction == direction and row.status == "ok"
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=provider)
        axis.set(title=f"{kind} attention, {direction}", xlabel="attended length", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds (median)")
    if axes[1].lines:
        axes[1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def format_rows(rows: Sequence[Row]) -> str:
    """One line for each measurement, then why others have no time."""
    header = ("length", "direction", "provider", "p50 ms", "TFLOP/s", "GB/s", "share of limit", "error", "may be")
    lines = [header] + [
        (
            row.workload.split()[-1],
            row.direction,
            row.provider,
            f"{row.p50_ms:.3f}",
            f"{row.tflops_per_s:.3g}",
            f"{row.gbytes_per_s:.3g}",
            "" if math.isnan(row.roofline_share) else f"{row.roofline_share:.0%}",
            f"{row.error:.1e}",
            f"{row.error_limit:.1e}",
        )
        for row in rows
        if row.status == "ok"
    ]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *format_reasons(rows).splitlines()])


def _write_profile(rows: Sequence[Row], kind: str, out: Path) -> None:
    csv_path, plot_path = profile_paths(kind, out)
    for path in (csv_path, plot_path):
        path.unlink(missing_ok=True)
    append_rows(csv_path, rows)
    if importlib.util.find_spec("matplotlib") is not None:  # rows are worth more than their plot
        plot_attention(rows, kind).savefig(plot_path)
