"""Section of the report about predictions, beside what was measured."""

from __future__ import annotations

import math
import re

from opensora_fast.html_report import HtmlReport

from ..predictions import TARGETS_FOR, predict
from ..rows import Row
from .results import Results, is_ours, joined, work_order

BEHIND = ("missed", "slower than predicted")  # verdicts


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
