"""`opensora-fast profile attention`: time of each implementation over the attended length, with its error beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_fast.progress import Progress

from .environment import Environment, describe_environment, query_gpu
from .providers.attention import ATTENTION_PROVIDERS, AttentionProvider, AttentionWork, make_attention_work
from .rows import Row, append_rows
from .timing import peak_memory, time_interleaved

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
# Heads, head size and tokens: ST-DiT-2 XL/2 with enough tokens to fill a GPU; a size that a CPU does in milliseconds.
SIZES = {"cuda": (16, 72, 65536), "cpu": (2, 72, 1024)}

# A provider may err twice as much as eager PyTorch in the same dtype (three times in gradients), and this much always:
# a few units in the last place, so that a lucky eager run does not condemn an honest one.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
FLOOR_ULPS = 4.0


@dataclass(frozen=True)
class Refused:
    """A provider whose result was wrong: it gets no row."""

    name: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g} is over its limit {self.limit:.3g}; no time is reported"


def attention_flops(work: AttentionWork, head_size: int, heads: int) -> float:
    """Useful floating-point operations of one forward: 4·H·D per pair of query and key."""
    if work.text is not None:
        pairs = work.layout.num_tokens * work.text.max_length
    else:
        lengths = [(t * s) * (s if work.kind == "spatial" else t) for t, s in _frames_and_tokens(work)]
        pairs = sum(lengths)
    return 4.0 * heads * head_size * pairs


def attention_bytes(work: AttentionWork, heads: int, head_size: int) -> float:
    """Least bytes of one forward: each input read once, the output written once."""
    element = torch.empty(0, dtype=work.dtype).element_size()
    inputs = sum(leaf.numel() for leaf in work.leaves.values())
    return float(element * (inputs + work.layout.num_tokens * heads * head_size))


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
    chosen = choose_providers(providers)
    lengths = tuple(lengths) if lengths else DEFAULT_LENGTHS.get((kind, device), ())
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths {list(lengths)}: each must be at least 1")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    heads, head_size, tokens = SIZES[device]
    environment = describe_environment(device)
    rows: list[Row] = []
    refused: list[Refused] = []
    with Progress(f"profile {kind} attention", total=len(lengths), unit="lengths") as progress:
        for length in lengths:
            work = make_attention_work(kind, length, device, dtype, tokens, heads, head_size)
            new_rows, new_refused = _measure(work, length, chosen, environment, budget_s / len(lengths))
            rows += new_rows
            refused += new_refused
            progress.advance(1, length=length)
    return rows, refused


def choose_providers(names: Sequence[str] | None) -> list[AttentionProvider]:
    known = {provider.name: provider for provider in ATTENTION_PROVIDERS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"provider {name!r} is unknown; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(ATTENTION_PROVIDERS)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in float64; infinite if anything is not finite."""
    error = ((actual.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return error if error == error else float("inf")


def _frames_and_tokens(work: AttentionWork) -> list[tuple[int, int]]:
    return [(frames, height * width) for frames, height, width in work.layout.shapes]


def _measure(
    work: AttentionWork,
    length: int,
    providers: Sequence[AttentionProvider],
    environment: Environment,
    budget_s: float,
) -> tuple[list[Row], list[Refused]]:
    heads, head_size = work.leaves["q" if work.kind == "cross" else "qkv"].shape[-2:]
    generator = torch.Generator(work.device).manual_seed(1)
    weight = torch.randn(work.layout.num_tokens, heads, head_size, generator=generator, device=work.device).to(
        work.dtype
    )
    reference = next(provider for provider in ATTENTION_PROVIDERS if provider.name == "reference")
    exact = _outputs(reference, work.to(torch.float64), weight.double())
    eager = _outputs(reference, work, weight)
    limits = _limits(exact, eager, work.dtype)
    base = Row(
        level="op",
        workload=f"length {length}",
        op=f"{work.kind}_attention",
        direction="forward",
        provider="",
        provider_version="",
        shape=f"N={work.layout.num_tokens} length={length} H={heads} D={head_size}",
        tokens=work.layout.num_tokens,
        dtype=str(work.dtype).removeprefix("torch."),
        status="unavailable",
        reason="not run",
        flops=attention_flops(work, head_size, heads),
        bytes=attention_bytes(work, heads, head_size),
        environment=environment,
    )
    rows: list[Row] = []
    refused: list[Refused] = []
    able: list[tuple[AttentionProvider, dict[str, float]]] = []
    for provider in providers:
        row = replace(base, provider=provider.name, provider_version=provider.version())
        reason = provider.missing(work)
        if reason:
            rows.append(replace(row, reason=reason))
            continue
        try:
            outputs = _outputs(provider, work, weight)
        except Exception as error:  # a provider that crashes costs its own row, whatever it raises
            rows.append(replace(row, status="failed", reason=f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            continue
        errors = {name: relative_error(outputs[name], exact[name]) for name in exact}
        worst = max(errors, key=lambda name: errors[name] / limits[name])
        if errors[worst] > limits[worst]:
            name = f"{base.op} length {length} {provider.name} ({worst})"
            refused.append(Refused(name, errors[worst], limits[worst]))
        else:
            able.append((provider, errors))

    for direction in ("forward", "forward+backward"):
        calls: dict[str, Callable[[], object]] = {
            provider.name: _call(provider, work, weight, direction) for provider, _ in able
        }
        if not calls:
            continue
        times = time_interleaved(calls, work.device, budget_s / 2)
        factor = 1.0 if direction == "forward" else 3.5  # backward recomputes the scores: 10 against 4 per pair
        for provider, errors in able:
            worst = "output" if direction == "forward" else max(errors, key=lambda name: errors[name] / limits[name])
            measured = times[provider.name]
            rows.append(
                replace(
                    base,
                    provider=provider.name,
                    provider_version=provider.version(),
                    direction=direction,
                    status="ok",
                    reason="",
                    samples=len(measured.milliseconds),
                    p20_ms=measured.percentile(20),
                    p50_ms=measured.percentile(50),
                    p80_ms=measured.percentile(80),
                    memory_bytes=peak_memory(calls[provider.name], work.device),
                    flops=base.flops * factor,
                    bytes=base.bytes * (1.0 if direction == "forward" else 3.0),
                    error=errors[worst],
                    error_limit=limits[worst],
                    sm_clock_mhz=query_gpu("clocks.sm") if work.device == "cuda" else "",
                )
            )
    return rows, refused


def _limits(exact: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    floor = FLOOR_ULPS * torch.finfo(dtype).eps
    return {
        name: (OUTPUT_FACTOR if name == "output" else GRADIENT_FACTOR) * relative_error(eager[name], exact[name])
        + floor
        for name in exact
    }


def _outputs(provider: AttentionProvider, work: AttentionWork, weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    leaves = work.leaves
    output = provider(work)
    gradients = torch.autograd.grad(output, list(leaves.values()), weight.to(output.dtype), allow_unused=True)
    named = {name: grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    return {"output": output.detach()} | named


def _call(provider: AttentionProvider, work: AttentionWork, weight: Tensor, direction: str) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return provider(work)

        return forward
    leaves = list(work.leaves.values())
    return lambda: torch.autograd.grad(provider(work), leaves, weight, allow_unused=True)


def plot_attention(rows: Sequence[Row], kind: str) -> Figure:
    """Milliseconds over length, one line per provider, forward and forward+backward side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=True):
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
    header = ("length", "direction", "provider", "p50 ms", "TFLOP/s", "GB/s", "error", "limit")
    lines = [header] + [
        (
            row.workload.split()[-1],
            row.direction,
            row.provider,
            f"{row.p50_ms:.3f}",
            f"{row.tflops_per_s:.3g}",
            f"{row.gbytes_per_s:.3g}",
            f"{row.error:.1e}",
            f"{row.error_limit:.1e}",
        )
        for row in rows
        if row.status == "ok"
    ]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    reasons = {row.provider: f"{row.status}: {row.reason}" for row in rows if row.status != "ok"}
    return "\n".join(text + [f"{provider}: {reason}" for provider, reason in reasons.items()])


def write_profile(rows: Sequence[Row], kind: str, out: Path) -> tuple[Path, Path]:
    """Writes the rows as CSV and the plot as SVG into `out`; returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    csv_path, plot_path = out / f"attention_{kind}.csv", out / f"attention_{kind}.svg"
    csv_path.unlink(missing_ok=True)
    append_rows(csv_path, rows)
    plot_attention(rows, kind).savefig(plot_path)
    return csv_path, plot_path
