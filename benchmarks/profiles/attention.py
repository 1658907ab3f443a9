"""`opensora-fast profile attention`: time of each implementation over the attended length, with its error beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opensora_fast.progress import Progress

from ..measuring.contest import FORWARD, FORWARD_BACKWARD, forward_backward_call, run_contest
from ..measuring.provider import choose_providers
from ..measuring.session import Refused, Session, threads_of
from ..providers.attention import ATTENTION_PROVIDERS
from ..providers.attention_work import KINDS, make_attention_work
from ..rows import CALLED, Row, append_rows
from ..suites.attention_lengths import DEFAULT_LENGTHS, SIZES, make_attention_contest
from ..suites.ceilings import measure_ceilings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def profile_attention(
    kind: str,
    lengths: Sequence[int] | None,
    providers: Sequence[str] | None,
    device: str,
    dtype: torch.dtype | None = None,
    budget_s: float = 60.0,
) -> tuple[list[Row], list[Refused]]:
    """Measures forward, and forward with backward, of every provider at every length.

    Args:
        kind: "spatial", "temporal" or "cross".
        lengths: attended lengths; None: those of the device.
        providers: names from `ATTENTION_PROVIDERS`; None: all.
        device: "cuda" or "cpu".
        dtype: None: bfloat16 on CUDA, float32 on the CPU.
        budget_s: time for all samples together.

    Returns:
        (rows, refused providers).

    Raises:
        ValueError: an unknown kind or provider, or a length below 1.
    """
    chosen = choose_providers(ATTENTION_PROVIDERS, providers)
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    lengths = tuple(dict.fromkeys(lengths)) if lengths else DEFAULT_LENGTHS[kind, device]
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths {list(lengths)}: each must be at least 1")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    session = Session(device)
    rows: list[Row] = []
    refused: list[Refused] = []
    progress = Progress(f"profile {kind} attention", total=len(lengths), unit="lengths")
    with threads_of(device), progress:
        measure_ceilings(session, dtype)
        for length in lengths:
            contest = make_attention_contest(kind, length, device, dtype, chosen, budget_s / len(lengths) / 2)
            new_rows, new_refused = run_contest(contest, session)
            rows += new_rows
            refused += new_refused
            progress.advance(1, length=length)
    return rows, refused


def trace_attention(
    kind: str, length: int, providers: Sequence[str] | None, device: str, out: Path, calls: int = 3
) -> list[Path]:
    """Writes a trace of forward and backward of each provider that runs here, for https://ui.perfetto.dev.

    Returns:
        The files, one for each provider.
    """
    from torch.profiler import ProfilerActivity, profile

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, head_size, tokens = SIZES[device]
    work = make_attention_work(kind, length, device, dtype, tokens, heads, head_size)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for provider in choose_providers(ATTENTION_PROVIDERS, providers):
        if provider.missing(work):
            continue
        call = forward_backward_call(provider.prepare(work), work)
        call()
        with profile(activities=activities) as profiler:
            for _ in range(calls):
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
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def format_rows(rows: Sequence[Row]) -> str:
    """One line for each measurement, then one for each provider that could not run."""
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
    reasons = {row.provider: f"{row.status}: {row.reason}" for row in rows if row.status != "ok"}
    called = [row for row in rows if row.timed.startswith(CALLED)]
    reasons |= {f"{row.provider}, {row.direction}": f"timed as {row.timed}" for row in called}
    return "\n".join(text + [f"{provider}: {reason}" for provider, reason in reasons.items()])


def write_profile(rows: Sequence[Row], kind: str, out: Path) -> tuple[Path, Path]:
    """Writes the rows as CSV and the plot as SVG into `out`; returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    csv_path, plot_path = out / f"attention_{kind}.csv", out / f"attention_{kind}.svg"
    csv_path.unlink(missing_ok=True)
    append_rows(csv_path, rows)
    plot_attention(rows, kind).savefig(plot_path)
    return csv_path, plot_path
