"""report.html: one folder of rows as a page. How fast, how right, against whom, how far from the limit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opensora_fast.html_report import HtmlReport

from ..measuring.refused import format_parts
from ..rows import Row
from ..shapes import VIDEO_SIZES
from . import ceilings, convergence, loader, memory, ops, predictions, steps
from .results import Results, check_share, is_ours, joined, rate
from .training_lines import AS_SHIPPED, COMPILED, WITH_FLASH

REPORT_FILE = "report.html"
CPU_NOTE = (
    "These are rows of a CPU, of small shapes: they prove that the suite works, and that results are right. They say "
    "nothing about speed on a GPU."
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        has_rows: whether there is something to show.
        fill: adds it.
        suite: of `opensora-fast bench` that makes the rows.
        lack: what has not been measured where there is nothing to show.
        gpu_only: no CPU can make such rows.
    """

    title: str
    has_rows: Callable[[Results], bool]
    fill: Callable[[HtmlReport, Results], None]
    suite: str
    lack: str
    gpu_only: bool = False


SECTIONS = (
    Section("Waterfall", steps.has_waterfall, steps.add_waterfall, "step", "what each technique brings"),
    Section("Training steps", steps.has_steps, steps.add_steps, "step", "training steps"),
    Section("Sampling steps", steps.has_sampling, steps.add_sampling, "step", "sampling steps"),
    Section("Memory", memory.has_memory, memory.add_memory, "step", "memory of training steps", True),
    Section("Ops", ops.has_ops, ops.add_ops, "kernels", "single ops"),
    Section("Attention over length", ops.has_lengths, ops.add_lengths, "kernels", "attention over length"),
    Section("Roofline", ops.has_roofline, ops.add_roofline, "kernels", "achieved rates under the roofline"),
    Section("Blocks", steps.has_blocks, steps.add_blocks, "kernels", "blocks of the model"),
    Section("Ceilings", ceilings.has_ceilings, ceilings.add_ceilings, "kernels", "the device's ceilings"),
    Section("Decoding", loader.has_loader, loader.add_loader, "loader", "decoding"),
    Section(
        "Convergence",
        convergence.has_convergence,
        convergence.add_convergence,
        "convergence",
        "training with kernels against training without",
    ),
    Section(
        "Predictions",
        predictions.has_predictions,
        predictions.add_predictions,
        "push",
        "what was predicted (for an H200 and an H100)",
        True,
    ),
)


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a results folder; returns its path.

    Raises:
        ValueError: there is no row in it, or rows of several devices, or a broken file.
    """
    results = Results.read(folder)
    report = HtmlReport(f"Benchmarks on {results.device_name}", _lead(results), contents=True)
    if not results.is_gpu:
        report.note(CPU_NOTE)
    report.section("At a glance")
    _add_glance(report, results)
    for section in SECTIONS:
        report.section(section.title)
        if section.has_rows(results):
            section.fill(report, results)
        else:
            report.paragraph(f"No rows. This makes them: `{_command(results, section)}`")
    report.section("Wrong, failed or unavailable")
    _add_reasons(report, results)
    report.section("All rows", "Type words to filter, click a title to sort. The newest row of each measurement.")
    report.table([title for title, _ in ROW_COLUMNS], [_row_cells(row) for row in results.latest], filtered=True)
    path = folder / REPORT_FILE
    report.write(path)
    return path


def _command(results: Results, section: Section) -> str:
    elsewhere = section.gpu_only and not results.is_gpu
    device, out = ("cuda", "FOLDER") if elsewhere else (results.device, results.folder)
    return f"opensora-fast bench --suite {section.suite} --device {device} --out {out}"


def _lead(results: Results) -> str:
    environments = [row.environment for row in results.latest if row.environment]
    commits = Counter(
        f"{item.commit[:12] or 'unknown'}{' with changes' if item.dirty else ''}" for item in environments
    )
    dates = sorted(item.date for item in environments)
    versions = [f"torch {item.torch}, triton {item.triton}, Python {item.python}" for item in environments]
    drivers = [f"driver {item.driver}" for item in environments if item.driver]
    span = dates[0] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    parts = [results.device_name, *dict.fromkeys(versions), *dict.fromkeys(drivers)]
    parts.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
    return " · ".join([*parts, span.replace("T", " ").replace("Z", " UTC")])


# ---- at a glance ----


def _add_glance(report: HtmlReport, results: Results) -> None:
    measured = [row for row in results.latest if row.status == "ok"]
    numbers = _speed_numbers(results) if results.is_gpu else []
    numbers += _error_numbers(measured)
    trained = convergence.worst_convergence(results)
    if trained is not None:
        label = f"loss curves: kernels from reference, over what it may be {trained.direction}"
        numbers.append((label, f"{check_share(trained) or 0.0:.0%}"))
    states = Counter(row.status for row in results.latest)
    missing = f"{states['unavailable']} unavailable, {states['failed']} failed, {len(results.refused)} refused as wrong"
    numbers.append((f"rows with a time; {missing}", f"{states['ok']:,}"))
    report.numbers(numbers)
    lacks = [section.lack for section in SECTIONS if not section.has_rows(results)]
    if results.is_gpu:
        resolutions = steps.unmeasured_resolutions(results, tuple(VIDEO_SIZES))
        if resolutions:
            lacks.insert(0, f"our training steps at {', '.join(resolutions)}")
    if not any(is_ours(row) for row in measured if row.level != "convergence"):
        lacks.insert(
            0,
            "speed of any of this project's kernels"
            if results.is_gpu
            else "speed of this project's kernels, which need a GPU",
        )
    if lacks:
        report.note(f"Not measured: {'; '.join(lacks)}.")
    if len({row.environment.undated for row in measured if row.environment}) > 1:
        report.note(
            "Not all of these rows are of the same sources and versions, and rows of one are compared with rows of "
            "another; the table of all rows says which each is of."
        )


def _speed_numbers(results: Results) -> list[tuple[str, str]]:
    numbers = []
    best = steps.best_step(results)
    if best is not None:
        numbers.append((f"tokens/s of a training step, {best.provider}, {best.workload}", rate(best.tokens_per_s)))
        if not math.isnan(best.roofline_share):
            numbers.append(("of the floor, the same step", f"{best.roofline_share:.0%}"))
    for peers, name in (
        (WITH_FLASH, "Open-Sora with flash attention"),
        (AS_SHIPPED, "Open-Sora as shipped"),
        (COMPILED, "torch.compile"),
    ):
        found = steps.speed_ups(results, peers)
        if found:
            low, high = min(gain for _, gain in found), max(gain for _, gain in found)
            text = f"×{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"×{low:.2f}–{high:.2f}"
            where = ", ".join(dict.fromkeys(workload.partition("×")[0] for workload, _ in found))
            numbers.append((f"on {name}, training steps at {where}", text))
    return numbers


def _error_numbers(measured: list[Row]) -> list[tuple[str, str]]:
    """The row nearest to its limit: of this project's own where there are any."""
    checked = [row for row in measured if check_share(row) is not None and row.level != "convergence"]
    own = [row for row in checked if is_ours(row)]
    worst = max(own or checked, key=lambda row: check_share(row) or 0.0, default=None)
    if worst is None:
        return []
    whose = "our worst" if own else "the worst"
    return [(f"{whose} error, over what it may be: {worst.name}", f"{check_share(worst):.0%}")]


# ---- what has no time ----


def _add_reasons(report: HtmlReport, results: Results) -> None:
    if results.refused:
        report.paragraph("Wrong results, which get no time:")
        report.table(
            ["row", "result", "error", "may be", "commit", "date"],
            [
                [item["name"], joined(item["result"], *format_parts(item))]
                + [f"{item['error']:.2e}", f"{item['error_limit']:.2e}", item["commit"][:12], item["date"]]
                for item in results.refused
            ],
        )
    else:
        report.paragraph("No result was wrong.")
    reasons = Counter((row.status, row.provider, row.reason) for row in results.latest if row.status != "ok")
    if reasons:
        report.table(
            ["status", "provider", "rows", "reason"],
            [[status, provider, count, reason] for (status, provider, reason), count in sorted(reasons.items())],
            filtered=len(reasons) > 12,
        )


# ---- all rows ----


def _number(value: float, digits: int = 4) -> float | str:
    return "" if math.isnan(value) else float(f"{value:.{digits}g}")


def _of_time(function: Callable[[Row], object]) -> Callable[[Row], object]:
    """Empty for a row without a time."""
    return lambda row: function(row) if row.status == "ok" else ""


ROW_COLUMNS: tuple[tuple[str, Callable[[Row], object]], ...] = (
    ("level", lambda row: row.level),
    ("op", lambda row: row.op),
    ("direction", lambda row: row.direction),
    ("workload", lambda row: row.workload),
    ("provider", lambda row: row.provider),
    ("status", lambda row: row.status),
    ("p50 ms", _of_time(lambda row: _number(row.p50_ms))),
    ("p20", _of_time(lambda row: _number(row.p20_ms))),
    ("p80", _of_time(lambda row: _number(row.p80_ms))),
    ("TFLOP/s", _of_time(lambda row: _number(row.tflops_per_s, 3) if row.flops else "")),
    ("GB/s", _of_time(lambda row: _number(row.gbytes_per_s, 3) if row.bytes else "")),
    ("k tokens/s", _of_time(lambda row: _number(row.tokens_per_s / 1e3) if row.tokens else "")),
    ("% of limit", _of_time(lambda row: _number(100 * row.roofline_share, 3))),
    ("GiB", _of_time(lambda row: _number(row.memory_bytes / 2**30, 3) if row.memory_bytes else "")),
    ("error", _of_time(lambda row: _number(row.error, 2))),
    ("may be", _of_time(lambda row: _number(row.error_limit, 2))),
    ("samples", _of_time(lambda row: row.samples)),
    ("dtype", lambda row: row.dtype),
    ("shape", lambda row: row.shape),
    ("reason", lambda row: row.reason),
    ("timed", lambda row: row.timed),
    ("checked on", lambda row: row.checked_on),
    ("version", lambda row: row.provider_version),
    ("MHz", lambda row: row.sm_clock_mhz),
    ("W", lambda row: row.power_w),
    ("commit", lambda row: _commit(row)),
    ("date", lambda row: row.environment.date if row.environment else ""),
)


def _commit(row: Row) -> str:
    if row.environment is None:
        return ""
    return f"{row.environment.commit[:9]}{'+' if row.environment.dirty else ''}"


def _row_cells(row: Row) -> list[object]:
    return [value(row) for _, value in ROW_COLUMNS]
