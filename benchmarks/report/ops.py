"""Sections of the report about single ops, ceilings, decoding, predictions, and the table of all rows."""

from __future__ import annotations

import math
import re

from opensora_fast.html_report import Bar, HtmlReport

from ..measuring.contest import FORWARD, FORWARD_BACKWARD
from ..predictions import TARGETS_FOR, predict
from ..providers.attention_work import KINDS
from ..rows import Row
from ..shapes import SIZES, Workload
from .figures import choose_markers, legend_of, plot_over_length, plot_roofline
from .results import (
    Results,
    Work,
    check_share,
    error_text,
    is_ours,
    joined,
    rate,
    time_text,
    timing_text,
    work_order,
)
from .steps import missing_bars, time_bars

BEHIND = ("missed", "slower than predicted")  # verdicts
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
    full = "what the ceilings measured here allow" if _has_floors(results, works) else "the fastest"
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


def _has_floors(results: Results, works: list[Work]) -> bool:
    return any(not math.isnan(results.floor_ms(work.first)) for work in works)


def _op_card(results: Results, work: Work) -> tuple[str, str, list[Bar]]:
    return joined(work.first.op, work.first.direction), work.first.shape, time_bars(results, work)


def _op_line(work: Work, ours: Row) -> list[object]:
    upstream = work.of("upstream")
    best = next((row for row in work.measured if not is_ours(row)), None)
    checked = check_share(ours)
    return [
        work.first.op,
        work.first.direction,
        work.first.workload,
        ours.p50_ms,
        "" if math.isnan(ours.roofline_share) else round(100 * ours.roofline_share),
        "" if checked is None else round(checked, 2),
        best.provider if best else "",
        best.p50_ms if best else "",
        round(best.p50_ms / ours.p50_ms, 2) if best else "",
        round(upstream.p50_ms / ours.p50_ms, 2) if upstream else "",
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
        report.paragraph("The dashed line is the floor of the counted operations and bytes at the measured ceilings.")
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


# ---- ceilings ----


def has_ceilings(results: Results) -> bool:
    return any(row.status == "ok" for level in ("copy", "gemm", "launch") for row in results.select(level))


def add_ceilings(report: HtmlReport, results: Results) -> None:
    sheet = results.datasheet
    text = "What this device does when nothing is in the way."
    if results.is_gpu:
        text += " The floors and limits of this page are counted from the best copy and the best matrix product."
    report.paragraph(f"{text} The full width is {f'the datasheet of {sheet.name}' if sheet else 'the best'}.")
    copies = [row for row in results.select("copy") if row.status == "ok"]
    products = [row for row in results.select("gemm") if row.status == "ok"]
    cards = []
    if copies:
        most = sheet.bandwidth / 1e9 if sheet else max(row.gbytes_per_s for row in copies)
        bars = [Bar(row.workload, row.gbytes_per_s / most, f"{row.gbytes_per_s:,.0f} GB/s") for row in copies]
        cards.append(("copy", "read plus written", bars))
    launches = [work for work in results.works("launch") if work.measured]
    for work in launches:
        slowest = work.measured[-1].p50_ms
        bars = [Bar(row.provider, row.p50_ms / slowest, time_text(row.p50_ms)) for row in work.measured]
        cards.append(("launch", "host time of one of many", bars + missing_bars(work)))
    best = max((row.tflops_per_s for row in products), default=0.0)
    most = sheet.matrix_flops / 1e12 if sheet else best
    for workload in dict.fromkeys(row.workload for row in products):
        bars = [
            Bar(
                joined(row.op, row.direction, row.provider),
                row.tflops_per_s / most,
                f"{row.tflops_per_s:.3g} TFLOP/s",
                tip=row.shape,
            )
            for row in products
            if row.workload == workload
        ]
        cards.append((f"matrix products, {workload}", products[0].dtype, bars))
    report.cards(cards)


# ---- decoding ----


def has_loader(results: Results) -> bool:
    return any(row.status == "ok" for level in ("loader", "buckets") for row in results.select(level))


def add_loader(report: HtmlReport, results: Results) -> None:
    report.paragraph(
        "Decoding real clips: frames that are kept, a second. Tokens/s are those the frames become, to be held against "
        "the tokens/s of a training step."
    )
    works = [work for work in results.works("loader") if work.measured]
    most = max((_frames_per_s(row) for work in works for row in work.measured), default=0.0)
    cards = []
    for name in dict.fromkeys(work.first.workload for work in works):
        bars = []
        for work in works:
            if work.first.workload == name:
                bars += [_decoding_bar(row, most) for row in work.measured]
        shape = next(work.first.shape for work in works if work.first.workload == name)
        cards.append((name, shape, bars))
    report.cards(cards)
    unable = [
        [row.provider, row.op, row.workload, row.status, row.reason]
        for row in results.select("loader")
        if row.status != "ok"
    ]
    if unable:
        report.table(["decoder", "codec", "workload", "status", "reason"], unable, filtered=len(unable) > 12)
    buckets = [row for row in results.select("buckets") if row.status == "ok"]
    if buckets:
        report.heading("Clips into buckets")
        report.table(
            ["configuration", "provider", "clips", "ms", "k clips/s"],
            [
                [row.workload, row.provider, clips := int(row.shape.split()[0]), row.p50_ms, round(clips / row.p50_ms)]
                for row in buckets
            ],
        )


def _decoding_bar(row: Row, most: float) -> Bar:
    frames = _frames_per_s(row)
    return Bar(
        f"{row.op}, {row.provider}",
        frames / most if frames else None,
        f"{frames:,.0f} frames/s" if frames else time_text(row.p50_ms),
        f"{rate(row.tokens_per_s)} tokens/s" if frames else "",
        check=check_share(row),
        tip=error_text(row),
    )


def _frames_per_s(row: Row) -> float:
    resolution = row.workload.partition("×")[0]
    if resolution not in SIZES:  # of another version of this project
        return 0.0
    return row.tokens_per_s / Workload(resolution, 1).frame_tokens


# ---- predictions ----


def has_predictions(results: Results) -> bool:
    return any(row.status == "ok" and predict(row) for row in results.latest)


def add_predictions(report: HtmlReport, results: Results) -> None:
    lines = [
        [joined(row.level, row.op), row.direction, row.workload, row.provider, *judge_prediction(results, row)]
        for row in sorted(results.latest, key=lambda row: (row.level, row.op, row.direction, work_order(row)))
        if row.status == "ok" and predict(row)
    ]
    lines.sort(key=lambda line: line[-1] not in BEHIND)
    missed = sum(line[-1] in BEHIND for line in lines)
    report.paragraph(
        "What was written down before anything was measured on such a GPU: for this project's own a span from good to "
        f"goal{_projected_text(results)}, for the others an estimate that is off when it is more than a tenth away. "
        "What fell behind comes first."
    )
    report.numbers(
        [
            ("predictions with a row", str(len(lines))),
            ("as predicted, or better", str(len(lines) - missed)),
            ("behind", str(missed)),
        ]
    )
    report.table(
        ["what", "direction", "workload", "provider", "predicted", "measured", "verdict"], lines, filtered=True
    )


def _projected_text(results: Results) -> str:
    """What steps are expected of where there are no goals for this GPU."""
    sheet = results.datasheet
    if sheet is None or sheet.name == TARGETS_FOR:
        return ""
    return f" (of steps, what rows of an {TARGETS_FOR} project for an {sheet.name})"


def judge_prediction(results: Results, row: Row) -> tuple[str, str, str]:
    """(predicted, measured, verdict): "goal reached", "good", "missed"; for others than ours "as predicted" or not."""
    predicted = predict(row)
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", predicted.partition(" ")[0])]
    low, high, unit = numbers[0], numbers[-1], predicted.partition(" ")[2]
    measured = _measured_in(results, row, unit)
    if measured is None or math.isnan(measured):
        return predicted, "", "cannot be told"
    text = f"{measured:.3g} {unit}"
    if unit == "µs":
        low, high, measured = -high, -low, -measured
    if is_ours(row):
        return predicted, text, "goal reached" if measured >= high else "good" if measured >= low else "missed"
    tenth = 0.1 * abs(low)
    if measured < low - tenth:
        return predicted, text, "slower than predicted"
    return predicted, text, "as predicted" if measured <= high + tenth else "faster than predicted"


def _measured_in(results: Results, row: Row, unit: str) -> float | None:
    """The row's result in the unit of a prediction; None for one that this page does not know."""
    if unit == "TFLOP/s":
        return row.tflops_per_s
    if unit == "k tokens/s":
        return row.tokens_per_s / 1e3
    if unit == "µs":
        return row.p50_ms * 1e3
    if unit == "% of copy":
        copies = [copy.gbytes_per_s for copy in results.select("copy") if copy.status == "ok"]
        return 100 * row.gbytes_per_s / max(copies) if copies else None
    return None
