"""`opensora-fast profile attention`: time of each implementation over the attended length, with its error beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opensora_fast.progress import Progress

from .case import make_template
from .contest import FORWARD, FORWARD_BACKWARD, OP_CALLS, Contest, forward_backward_call, run_contest
from .providers.attention import ATTENTION_PROVIDERS, ATTENTION_REFERENCE
from .providers.attention_work import KINDS, count_attention, make_attention_work
from .providers.provider import Provider, choose_providers
from .replay import recorder_of
from .rows import CALLED, Row, append_rows
from .session import Refused, Session, threads_of
from .suites.ceilings import measure_ceilings
from .timing import Sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_LENGTHS = {
    ("spatial", "cuda"): (64, 144, 256, 405, 920, 1590, 2304, 3600, 4096),
    ("temporal", "cuda"): (1, 4, 8, 16, 32, 64, 96, 128, 256, 512),
    ("cross", "cuda"): (1, 20, 77, 120, 200),
    ("spatial", "cpu"): (16, 64, 144),
    ("temporal", "cpu"): (1, 4, 16, 32),
    ("cross", "cpu"): (1, 20, 77),
}
# Heads, head size and tokens: ST-DiT-2 XL/2 with enough tokens to fill a GPU, but no more than 65535 sequences, which
# PyTorch's attention cannot launch; a size that a CPU does in milliseconds.
SIZES = {"cuda": (16, 72, 49152), "cpu": (2, 72, 512)}
# Tokens of the comparison with float64, whose scores are kept in memory: 16 frames of 144, two of 4096.
CHECK_TOKENS = {"cuda": 8192, "cpu": 512}


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


def make_attention_contest(
    kind: str, length: int, device: str, dtype: torch.dtype, providers: Sequence[Provider], seconds: float
) -> Contest:
    """The contest of one attended length; `seconds` for the samples of each direction."""
    heads, head_size, tokens = SIZES[device]
    work = make_attention_work(kind, length, device, dtype, tokens, heads, head_size)
    shapes, channels = work.layout.shapes, heads * head_size
    counts = count_attention(kind, shapes, work.text_lengths, channels, dtype.itemsize)
    check_work = None
    if CHECK_TOKENS[device] < work.layout.num_tokens:
        check_work = make_attention_work(kind, length, device, dtype, CHECK_TOKENS[device], heads, head_size)
    return Contest(
        template=attention_template(kind, length, device, dtype),
        work=work,
        providers=providers,
        references=(ATTENTION_REFERENCE,),
        calls=OP_CALLS,
        counts=dict(zip(OP_CALLS, counts, strict=True)),
        sampling=Sampling(seconds),
        check_work=check_work,
        check_name=f"length {length}, {check_work.layout.num_tokens} tokens" if check_work else "",
        make_recorder=recorder_of(device),
    )


def attention_template(kind: str, length: int, device: str, dtype: torch.dtype) -> Row:
    """What the rows of one attended length have in common."""
    heads, head_size, tokens = SIZES[device]
    tokens = max(tokens // 2, 1) * 2 if kind == "cross" else max(tokens // length, 1) * length
    return make_template(
        "op",
        f"length {length}",
        op=f"{kind}_attention",
        shape=f"N={tokens} length={length} H={heads} D={head_size}",
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
    )


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
