"""Sections of the report about single ops: beside each other, attention over length, under the roofline."""

from __future__ import annotations

import math

from opensora_fast.html_report import Bar, HtmlReport

from ..measuring.contest import FORWARD, FORWARD_BACKWARD
from ..providers.attention_work import KINDS
from ..rows import Row
from .bars import time_bars
from .figures import choose_markers, legend_of, plot_over_length, plot_roofline
from .results import (
    Results,
    Work,
    check_share,
    is_ours,
    joined,
    timing_text,
    work_order,
)

LENGTH = "length "  # workloads of attention over its length begin so


def _op_works(results: Results) -> list[Work]:
    works = [work for work in results.works("op") if not work.first.workload.startswith(LENGTH)]
    return sorted(works, key=lambda work: (work.first.op, work.first.direction, work_order(work.first)))


def has_ops(results: Results) -> bool:
    return any(work.measured for work in _op_works(results))


def add_ops(report: HtmlReport, results: Results) -> None:
    works = [work for work in _op_works(results) if work.measured]
    names = [work.first.workload for work in works]
    shown = max(dict.fromkeys(names), key=lambda name: (names.count(name), name.startswith("240p")))
    counted = next((work.first for work in works if not math.isnan(results.floor_ms(work.first))), None)
    full = f"the floor at {results.limit_text(counted.dtype)}" if counted else "the fastest"
    report.paragraph(
        f"Each op at {shown}, or where it was measured; the full width of a bar is {full}, the thin bar the error over "
        f"what it may be. The other workloads are in the tables. "
        f"{timing_text(row for work in works for row in work.measured)}"
    )
    places = {work.first.op: work.first.workload for work in reversed(works)}
    places |= {work.first.op: shown for work in works if work.first.workload == shown}
    report.cards([_op_card(results, work) for work in works if work.first.workload == places[work.first.op]])
    if not any(work.ours for work in works):
        report.paragraph("None of this project's kernels has a time here, so there is no comparison with the others.")
        return
    report.heading("Ours against the best of the others")
    report.table(
        ["op", "direction", "workload", "ours ms", "% of limit", "error / limit", "best other", "its ms"]
        + ["× best other", "× upstream"],
        [_op_line(work, work.ours) for work in works if work.ours],
        filtered=True,
    )


def _op_card(results: Results, work: Work) -> tuple[str, str, list[Bar]]:
    return joined(work.first.op, work.first.direction), work.first.shape, time_bars(results, work)


def _op_line(work: Work, ours: Row) -> list[object]:
    upstream = work.of("upstream")
    best = next((row for row in work.measured if not is_ours(row)), None)
    checked = check_share(ours)

    def speed_up(other: Row | None) -> object:
        if other is None:
            return ""
        # A call's time holds the host's work, a replay's does not.
        return round(other.p50_ms / ours.p50_ms, 2) if other.is_replayed == ours.is_replayed else "timed otherwise"

    return [
        work.first.op,
        work.first.direction,
        work.first.workload,
        ours.p50_ms,
        "" if math.isnan(ours.roofline_share) else round(100 * ours.roofline_share),
        "" if checked is None else round(checked, 2),
        best.provider if best else "",
        best.p50_ms if best else "",
        speed_up(best),
        speed_up(upstream),
    ]


# ---- attention over length ----


def _length_rows(results: Results) -> list[Row]:
    return [row for row in results.select("op") if row.workload.startswith(LENGTH) and row.status == "ok"]


def has_lengths(results: Results) -> bool:
    return bool(_length_rows(results))


def add_lengths(report: HtmlReport, results: Results) -> None:
    rows = _length_rows(results)
    tokens = sorted({row.tokens for row in rows})
    around = f"{tokens[0]} to {tokens[-1]}" if tokens[0] != tokens[-1] else str(tokens[0])
    report.paragraph(
        f"The number of tokens stays about the same ({around}), the length that each attends to grows. Lower is "
        f"faster. {timing_text(rows)}"
    )
    if any(not math.isnan(results.floor_ms(row)) for row in rows):
        source = results.limit_text(rows[0].dtype)
        report.paragraph(f"The dashed line is the floor of the counted operations and bytes at {source}.")
    report.legend(legend_of(rows))
    figures = []
    for kind in KINDS:
        for direction in (FORWARD, FORWARD_BACKWARD):
            own = [row for row in rows if row.op == f"{kind}_attention" and row.direction == direction]
            if own:
                figures.append((plot_over_length(results, own), f"{kind} attention, {direction}"))
    report.figures(figures)


# ---- roofline ----


def _roofline_rows(results: Results) -> list[Row]:
    ops = results.select("op")
    # Where norms were measured too: the resolutions and the mixed pack, not every length.
    main = {row.workload for row in ops if row.op == "modulated_norm"} or {row.workload for row in ops}
    rows = [row for row in ops if row.workload in main] + results.select("gemm")
    return [row for row in rows if row.status == "ok" and row.flops and row.bytes]


def has_roofline(results: Results) -> bool:
    return bool(_roofline_rows(results))


def add_roofline(report: HtmlReport, results: Results) -> None:
    rows = _roofline_rows(results)
    markers = choose_markers(row.op for row in rows)
    report.paragraph(
        "Every point is a row: useful operations over time, against useful operations over least bytes. Norms, gates "
        "and GELU are bound by bytes alone and have no point here. Point at one to see what it is."
    )
    report.legend(legend_of(rows))
    shapes = {
        "o": "●",
        "s": "■",
        "D": "◆",
        "^": "▲",
        "v": "▼",
        "P": "✚",
        "*": "★",
        "X": "✖",
        "h": "⬢",
        "<": "◀",
        ">": "▶",
    }
    report.paragraph("   ".join(f"{shapes[marker]} {op}" for op, marker in markers.items()))
    report.figures(
        (plot_roofline(results, own, markers), title)
        for title, own in (
            ("forward", [row for row in rows if row.direction == FORWARD]),
            (
                "forward with backward, and the two gradients of matrix products",
                [row for row in rows if row.direction != FORWARD],
            ),
        )
        if own
    )
