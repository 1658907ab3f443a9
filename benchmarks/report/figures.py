"""Figures of the report: attention over length, rooflines, loss curves. One axis each, to fit a narrow page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from opensora_fast.costs.hardware import Gpu
from opensora_fast.html_report import ACCENT

from ..rows import Row
from .results import Results, is_ours, time_text

SIZE = (4.9, 3.5)
# Colors that can be told apart on white and on black.
COLORS = {
    "ours": ACCENT,
    "open-sora": "#555555",
    "open-sora-flash": "#8a6d1d",
    "upstream": "#8c8c8c",
    "upstream-flash": "#b8860b",
    "eager": "#e07b39",
    "compile": "#3fa34d",
    "compile-upstream": "#6b7f2a",
    "sdpa-flash": "#c44e52",
    "sdpa-cudnn": "#9467bd",
    "sdpa-efficient": "#d17fb5",
    "sdpa-math": "#a07855",
    "torch-varlen": "#5f9ea0",
    "flex": "#17a2b8",
    "flash-attn-2": "#d98880",
    "flash-attn-3": "#e74c3c",
    "flash-attn-4": "#ff7f50",
    "flash-attn-4-padded": "#ffa07a",
    "xformers": "#7f8fd9",
    "apex": "#b5651d",
    "liger": "#2e8b57",
    "cublas": "#8c8c8c",
    "torch-cpu": "#8c8c8c",
}
OTHER_COLOR = "#8c8c8c"
MARKERS = "osD^vP*Xh<>"


def color_of(provider: str) -> str:
    return COLORS.get(provider, ACCENT if provider.startswith("ours") else OTHER_COLOR)


def legend_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(provider, color) in the order of COLORS."""
    present = dict.fromkeys(row.provider for row in rows)
    known = [name for name in COLORS if name in present]
    return [(name, color_of(name)) for name in known + [name for name in present if name not in COLORS]]


def plot_over_length(results: Results, rows: Sequence[Row]) -> Figure:
    """Median time over the attended length, one line for each provider, and the floor."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for provider, _ in legend_of(rows):
        own = sorted((row for row in rows if row.provider == provider), key=length_of)
        emphasis = {"linewidth": 2.4, "zorder": 3} if is_ours(own[0]) else {"linewidth": 1.3}
        axis.plot([length_of(row) for row in own], [row.p50_ms for row in own], color=color_of(provider), **emphasis)
        for row in own:
            tip = f"{provider}, {row.workload}: {time_text(row.p50_ms)}, {row.tflops_per_s:.3g} TFLOP/s"
            _point(axis, length_of(row), row.p50_ms, tip, color=color_of(provider), markersize=4.5)
    floors = sorted({length_of(row): results.floor_ms(row) for row in rows}.items())
    if not any(math.isnan(floor) for _, floor in floors):
        axis.plot(*zip(*floors, strict=True), color="#000000", linestyle="--", linewidth=1.1)
        axis.annotate("floor", floors[0], xytext=(0, -10), textcoords="offset points", fontsize=8.5)
        axis.set_ylim(bottom=0.7 * min(floor for _, floor in floors))
    axis.set(xscale="log", yscale="log", xlabel="attended length", ylabel="milliseconds")
    axis.set_xticks([length for length, _ in _spread(floors)], [str(length) for length, _ in _spread(floors)])
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    _clean(axis)
    return figure


def plot_roofline(results: Results, rows: Sequence[Row], markers: Mapping[str, str]) -> Figure:
    """Achieved TFLOP/s over FLOP/byte, under the ceilings of each dtype that are measured, and the datasheet's."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for row in sorted(rows, key=is_ours):
        tip = (
            f"{row.provider}, {row.op} {row.workload} {row.direction}: {row.tflops_per_s:.3g} TFLOP/s, "
            f"{row.gbytes_per_s:.3g} GB/s"
        )
        style = {"markersize": 6.5, "zorder": 4} if is_ours(row) else {"markersize": 4.5, "alpha": 0.75}
        _point(
            axis,
            row.flops / row.bytes,
            row.tflops_per_s,
            tip,
            marker=markers[row.op],
            color=color_of(row.provider),
            **style,
        )
    intensities = [row.flops / row.bytes for row in rows]
    start, end = min(intensities) / 2, max(intensities) * 2
    dtypes = dict.fromkeys(row.dtype for row in rows)
    lines = [(gpu, f"measured, {dtype}", "-") for dtype in dtypes if (gpu := results.ceilings(dtype))]
    if results.datasheet:
        lines.append((results.datasheet, "datasheet, bfloat16", "--"))
    end = max([end, *(3 * gpu.matrix_flops / gpu.bandwidth for gpu, _, _ in lines)])
    for index, (gpu, label, style) in enumerate(lines):
        _roof(axis, gpu, style, start, end)
        sample = "– –" if style == "--" else "—"
        axis.annotate(
            f"{sample} {label}: {gpu.matrix_flops / 1e12:.3g} TFLOP/s, {gpu.bandwidth / 1e9:.4g} GB/s",
            (1, 0),
            xycoords="axes fraction",
            xytext=(-4, 6 + 12 * index),
            textcoords="offset points",
            fontsize=8.5,
            ha="right",
        )
    axis.set(xscale="log", yscale="log", xlabel="useful FLOP for each byte that must move", ylabel="useful TFLOP/s")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _clean(axis)
    return figure


def plot_lines(lines: Sequence[tuple[str, Sequence[float], str]], label: str, log: bool = False) -> Figure:
    """Values over training steps: (tooltip, values, color) of each line."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for tip, values, color in lines:
        (line,) = axis.plot(range(1, len(values) + 1), values, color=color, linewidth=1.3, alpha=0.85)
        line.set_gid(f"tip:{tip}")
    axis.set(xlabel="step", ylabel=label, yscale="log" if log else "linear")
    _clean(axis)
    return figure


def length_of(row: Row) -> int:
    """The attended length of a row whose workload is "length 405"."""
    return int(row.workload.split()[-1])


def choose_markers(ops: Iterable[str]) -> dict[str, str]:
    return {op: MARKERS[index % len(MARKERS)] for index, op in enumerate(dict.fromkeys(ops))}


def _roof(axis: Axes, gpu: Gpu, style: str, start: float, end: float) -> None:
    ridge = gpu.matrix_flops / gpu.bandwidth
    x = [start, ridge, end]
    y = [min(value * gpu.bandwidth, gpu.matrix_flops) / 1e12 for value in x]
    axis.plot(x, y, color="#000000", linestyle=style, linewidth=1.2, zorder=1)


def _point(axis: Axes, x: float, y: float, tip: str, marker: str = "o", **style: object) -> None:
    (artist,) = axis.plot([x], [y], marker=marker, linestyle="none", markeredgewidth=0, **style)
    artist.set_gid(f"tip:{tip}")


def _clean(axis: Axes) -> None:
    axis.grid(alpha=0.35, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _spread(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those whose labels do not touch on a logarithmic axis."""
    kept: list[tuple[int, float]] = []
    span = math.log(max(points[-1][0] / points[0][0], 2))
    for point in points:
        if not kept or math.log(point[0] / kept[-1][0]) > span / 9:
            kept.append(point)
    return kept
