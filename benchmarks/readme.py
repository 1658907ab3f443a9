"""The figure and the tables of the README, from committed rows: `python -m opensora_fast.benchmarks.readme`.

Rewrites the block between two markers of README.md, and `benchmarks/results/training.svg`. With --check it writes
nothing and exits with 1 where either is out of date.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora_fast import kernels
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.model import STDiT2

from .convergence import AGAINST_ROUNDING
from .report.results import Results, Work, is_ours, published_for
from .roofline import floor_tokens_per_s
from .rows import Row, read_folder
from .shapes import VIDEO_SIZES, fill
from .suites.scale import FILL_TOKENS, scale_of

BEGIN = "<!-- measured: begin; `python -m opensora_fast.benchmarks.readme` writes what follows -->"
END = "<!-- measured: end -->"
FIGURE = "benchmarks/results/training.svg"
FRAMES = 16
GOALS_FOR, PUBLISHED_ON = "H200", "H800"
# Open-Sora's own code first, then this project's writing of it.
AS_SHIPPED, WITH_FLASH = ("open-sora", "upstream"), ("open-sora-flash", "upstream-flash")
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Line:
    """One resolution: tokens/s of one GPU.

    Attributes:
        gpu: whose speed is shown.
        floors: GPU → what operations and bytes allow at its datasheet's rates.
        published: by Open-Sora, on H800, with VAE and T5.
        measured: our fastest row on `gpu`.
        as_shipped: Open-Sora's model as it is shipped, on the same videos in the same run; None: not measured.
        with_flash: likewise, with the flash attention that its configurations mean to turn on.
    """

    resolution: str
    gpu: str
    floors: dict[str, float]
    published: float | None
    measured: Row | None
    as_shipped: Row | None
    with_flash: Row | None


def main(arguments: list[str]) -> int:
    root = Path(kernels.__file__).parent.parent
    readme = root / "README.md"
    if not readme.exists():
        raise SystemExit(f"{readme} does not exist: run this in a checkout of the repository")
    folders = read_results(root / "benchmarks" / "results")
    wanted = {readme: replace_block(readme.read_text(encoding="utf-8"), build_block(folders))}
    wanted[root / FIGURE] = build_figure(training_lines(folders))
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(root)) for path in old)
    if "--check" in arguments:
        print(f"out of date: {names}; `python -m opensora_fast.benchmarks.readme` rewrites" if old else "up to date")
        return 1 if old else 0
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    print(f"rewritten: {names}" if old else "up to date")
    return 0


def read_results(results: Path) -> list[Results]:
    """The folders of committed rows, by name."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return [Results.read(folder) for folder in folders if read_folder(folder)]


def replace_block(readme: str, block: str) -> str:
    """The README with another block between its markers.

    Raises:
        ValueError: there are no markers, or not in this order.
    """
    if not -1 < readme.find(BEGIN) < readme.find(END):
        raise ValueError(f"README.md has no block between {BEGIN} and {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def training_lines(folders: list[Results]) -> list[Line]:
    """The five resolutions at 16 frames, on the GPU that the goals are for; where only others were measured, on one."""
    scale, gpu = scale_of("cuda"), _shown_gpu(folders)
    with torch.device("meta"):
        parameters = float(sum(parameter.numel() for parameter in STDiT2(scale.config).parameters()))
    lines = []
    for resolution in VIDEO_SIZES:
        workload = fill(resolution, FRAMES, FILL_TOKENS)
        floors = {
            name: floor_tokens_per_s(scale.config, workload, scale.text, parameters, DATASHEETS[name])
            for name in (gpu, PUBLISHED_ON)
        }
        published = max((item.tokens_per_s for item in published_for(workload.name)), default=None)
        ours = _best_step(folders, gpu, workload.name)
        beside = [_beside(folders, ours, providers) for providers in (AS_SHIPPED, WITH_FLASH)]
        lines.append(Line(resolution, gpu, floors, published, ours, *beside))
    return lines


def _shown_gpu(folders: list[Results]) -> str:
    measured = [gpu for gpu in (GOALS_FOR, *DATASHEETS) if _own_steps(folders, gpu)]
    return next(iter(measured), GOALS_FOR)


def _own_steps(folders: list[Results], gpu: str) -> list[Row]:
    """Our measured training steps of 16 frames at the resolutions of the table."""
    return [
        row
        for results in folders
        if results.datasheet is DATASHEETS[gpu]
        for row in results.select("step", "")
        if row.status == "ok" and is_ours(row) and row.workload in {f"{name}×{FRAMES}" for name in VIDEO_SIZES}
    ]


def _best_step(folders: list[Results], gpu: str, workload: str) -> Row | None:
    rows = [row for row in _own_steps(folders, gpu) if row.workload == workload]
    return max(rows, key=lambda row: row.tokens_per_s, default=None)


def _beside(folders: list[Results], ours: Row | None, providers: Sequence[str]) -> Row | None:
    """The row of the first of the providers that was measured beside ours."""
    rows = [row for results in folders for row in results.select("step", "") if row.provider in providers]
    alike = (row for row in rows if row.status == "ok" and ours is not None and _same_run(row, ours))
    return min(alike, key=lambda row: providers.index(row.provider), default=None)


def _same_run(row: Row, other: Row) -> bool:
    assert row.environment is not None and other.environment is not None
    same_work = (row.workload, row.direction, row.shape, row.dtype) == (
        other.workload,
        other.direction,
        other.shape,
        other.dtype,
    )
    places = [(item.environment.device_name, item.environment.commit) for item in (row, other)]
    return same_work and places[0] == places[1]


# ---- the block ----


def build_block(folders: list[Results]) -> str:
    parts = [_training_text(training_lines(folders))]
    parts += [_cpu_text(results) for results in folders if not results.is_gpu]
    return "\n\n".join(parts)


def _training_text(lines: list[Line]) -> str:
    gpu = lines[0].gpu
    shipped, flash = [line.as_shipped for line in lines], [line.with_flash for line in lines]
    table = [
        ["thousand tokens/s", *(line.resolution for line in lines)],
        [f"limit of one {gpu}, counted", *(_thousands(line.floors[gpu]) for line in lines)],
        [f"**ours on one {gpu}**", *(_measured(line) for line in lines)],
        *_peer_line("Open-Sora's model as shipped, same GPU and run", shipped),
        *_peer_line("the same with flash attention", flash),
        [f"limit of one {PUBLISHED_ON}, counted", *(_thousands(line.floors[PUBLISHED_ON]) for line in lines)],
        [f"Open-Sora on {PUBLISHED_ON}, published", *(_thousands(line.published) for line in lines)],
    ]
    measured = [line.measured for line in lines if line.measured]
    commits = sorted({row.environment.commit[:9] for row in measured if row.environment})
    caption = (
        f"Training ST-DiT-2 on videos of {FRAMES} frames. The limits are counted operations and bytes at the rates of "
        f"the datasheets; nothing reaches them. The published figures include the VAE and T5, ours do not."
    )
    caption += f" Measured at {', '.join(commits)}." if commits else " **No speed on a GPU has been measured yet.**"
    if any(shipped):
        whose = "its own code" if {row.provider for row in shipped if row} == {AS_SHIPPED[0]} else "in our writing"
        caption += (
            f" As shipped ({whose}): all blocks recomputed, and plain attention, as v1.1.0's configurations give flash "
            "attention a name that its model no longer knows. The published figures are older than that change, and so "
            "had flash attention on."
        )
        if not any(flash):
            caption += " **Open-Sora with flash attention has not been measured here yet.**"
    figure = f"![Tokens per second of a training step at five resolutions: limits and figures]({FIGURE})"
    return f"{figure}\n\n{_wrap(caption)}\n\n{_table(table)}"


def _peer_line(name: str, rows: Sequence[Row | None]) -> list[list[str]]:
    return [[name, *(_thousands(row and row.tokens_per_s) for row in rows)]] if any(rows) else []


def _cpu_text(results: Results) -> str:
    """What rows of a CPU can show: that results are right."""
    works = [work for work in results.works("op") if work.measured]
    lines = []
    for op in dict.fromkeys(work.first.op for work in works):
        rows = [row for work in works if work.first.op == op for row in work.measured if row.error_limit > 0]
        worst = max(rows, key=lambda row: row.error / row.error_limit)
        lines.append(
            [
                f"`{op}`",
                str(len(rows)),
                worst.workload,
                worst.provider,
                f"{worst.error:.1e}",
                f"{worst.error_limit:.1e}",
            ]
        )
    environment = results.latest[0].environment
    assert environment is not None
    unmeasured = (
        ""
        if any(is_ours(row) for work in works for row in work.measured)
        else (" (this project's kernels are timed on GPUs only; `tests/kernels` holds them to the same limits)")
    )
    caption = (
        f"On a CPU ({results.device_name}, torch {environment.torch}, commit {environment.commit[:9]}) the suite shows "
        f"that results are right{unmeasured}; its times say nothing about a GPU. Of each op the row nearest to its "
        "limit:"
    )
    text = f"{_wrap(caption)}\n\n{_table([['op', 'rows', 'worst at', 'provider', 'error', 'may be'], *lines])}"
    trained = [work for work in results.works("convergence") if work.first.direction == AGAINST_ROUNDING]
    return "\n\n".join([text, *(_wrap(_convergence_text(work)) for work in trained if work.measured)])


def _convergence_text(work: Work) -> str:
    row = work.measured[0]
    return (
        f"Trained with the kernels and with the reference ({row.workload}, {row.dtype}; {row.checked_on}), the loss "
        f"curves are {row.error:.1e} apart, relative; rounding alone may part them by {row.error_limit:.1e}."
    )


def _thousands(tokens_per_s: float | None) -> str:
    return (
        "–"
        if tokens_per_s is None
        else f"{tokens_per_s / 1e3:.1f}"
        if tokens_per_s < 1e5
        else f"{tokens_per_s / 1e3:.0f}"
    )


def _measured(line: Line) -> str:
    return NOT_MEASURED if line.measured is None else f"**{_thousands(line.measured.tokens_per_s)}**"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    aligned = ["---"] + ["--:" if column[:1].isdigit() else "---" for column in head[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, aligned, *body))


def _wrap(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# ---- the figure ----

WIDTH, GROUP, BAR, LEFT, RIGHT, TOP = 860, 92, 17, 70, 200, 62
STYLE = """
text { font: 13px system-ui, "Segoe UI", sans-serif; fill: #1d2733; } .soft { fill: #5b6b7c; }
.title { font-weight: 600; }
.paper { fill: #ffffff; } .limit { fill: none; stroke: #5b6b7c; stroke-dasharray: 4 3; } .ours { fill: #0b6bcb; }
.given { fill: #d9822b; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .soft { fill: #9aa9b8; } .paper { fill: #16202b; }
  .limit { stroke: #9aa9b8; } .ours { fill: #6ab0ff; } }
"""


def build_figure(lines: list[Line]) -> str:
    """Bars as SVG, the same bytes for the same rows: no library draws it."""
    most = max(floor for line in lines for floor in line.floors.values())
    scale = (WIDTH - LEFT - RIGHT) / most
    height = TOP + GROUP * len(lines) + 6
    parts = [
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        _text(16, 26, f"A training step of {FRAMES} frames, thousand tokens/s on one GPU", "title"),
        _text(16, 46, "limits are counted, not measured; published figures include VAE and T5", "soft"),
    ]
    for index, line in enumerate(lines):
        y = TOP + GROUP * index
        parts.append(_text(16, y + 0.5 * GROUP - 2, line.resolution, "title"))
        bars = [
            ("limit", line.floors[line.gpu], f"limit of {line.gpu}"),
            ("ours", line.measured.tokens_per_s if line.measured else None, f"ours on {line.gpu}"),
            ("limit", line.floors[PUBLISHED_ON], f"limit of {PUBLISHED_ON}"),
            ("given", line.published, f"Open-Sora on {PUBLISHED_ON}, published"),
        ]
        for place, (kind, value, label) in enumerate(bars):
            top = y + (BAR + 3) * place
            length = 0.0 if value is None else value * scale
            if value is not None:
                parts.append(f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>')
            lacking = NOT_MEASURED if kind == "ours" else "none"
            text = f"{label}: {lacking if value is None else _thousands(value)}"
            parts.append(_text(LEFT + length + 7, top + 13, text, "soft" if value is None or kind == "limit" else ""))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
