"""Rows as a table for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ..measuring.case import Case
from ..predictions import predict, predict_for
from ..rows import CALLED, Key, Row
from ..suites.estimates import STARTUP_S

# (title, value of a row); a column without any value is left out.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("level", lambda row: row.level),
    ("op", lambda row: row.op),
    ("direction", lambda row: row.direction if row.direction != row.level else ""),
    ("workload", lambda row: row.workload),
    ("provider", lambda row: row.provider),
    ("p50 ms", lambda row: f"{row.p50_ms:.4g}"),
    ("TFLOP/s", lambda row: f"{row.tflops_per_s:.3g}" if row.flops else ""),
    ("GB/s", lambda row: f"{row.gbytes_per_s:.4g}" if row.bytes else ""),
    ("k tok/s", lambda row: f"{row.tokens_per_s / 1e3:.4g}" if row.tokens else ""),
    ("of limit", lambda row: "" if math.isnan(row.roofline_share) else f"{row.roofline_share:.0%}"),
    ("GiB", lambda row: f"{row.memory_bytes / 2**30:.3g}" if row.memory_bytes else ""),
    ("error", lambda row: f"{row.error:.0e}"),
    ("may be", lambda row: f"{row.error_limit:.0e}"),
    ("n", lambda row: str(row.samples)),
    ("predicted", predict),
)
TEXT_COLUMNS = 5  # aligned to the left


def format_table(rows: Iterable[Row]) -> str:
    """One line for each measurement, those of the same work together, the fastest first."""
    measured = [row for row in rows if row.status == "ok"]
    order: dict[Key, int] = {}
    for row in measured:
        order.setdefault(row.work, len(order))
    measured.sort(key=lambda row: (order[row.work], row.p50_ms))
    if not measured:
        return "no row with a time"
    columns = [(title, [value(row) for row in measured]) for title, value in COLUMNS]
    columns = [(title, values) for title, values in columns if any(values)]
    widths = [max(len(title), *(len(value) for value in values)) for title, values in columns]
    titles = [title for title, _ in COLUMNS[:TEXT_COLUMNS]]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if title in titles else cell.rjust(width)
            for cell, width, (title, _) in zip(cells, widths, columns, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    lines = [line([title for title, _ in columns])]
    sizes = Counter(row.work for row in measured)
    before = measured[0].work
    for index, row in enumerate(measured):
        work = row.work
        if work != before and max(sizes[work], sizes[before]) > 1:
            lines.append("")
        before = work
        lines.append(line([values[index] for _, values in columns]))
    return "\n".join(lines)


MARKS_S = (540, 1080)  # one run of nine minutes, and two


def format_plan(cases: Sequence[Case], gpu: str = "") -> str:
    """One line for each case: predicted seconds of the case and until its end, name, sizes, providers.

    A line stands where the time of one and of two runs of nine minutes is used up.

    Args:
        gpu: such as "H200"; what is expected of the rows on it follows. "": a CPU, where the time of few is known, so
            that there are no sums.
    """
    estimated = any(case.seconds for case in cases)
    marks = list(MARKS_S) if gpu else []
    lines, total = [], STARTUP_S
    for case in cases:
        total += case.seconds
        if marks and total > marks[0]:
            lines.append(f"---- fits into {marks.pop(0)} s, by the prediction ----")
            total += STARTUP_S if marks else 0.0  # the next run loads everything again
        work = f"{case.name}  [{case.template.shape}]  {', '.join(case.providers)}"
        seconds = f"{case.seconds:5.0f} s" if case.seconds else "      ?"
        until = f"  {total:6.0f} s" if gpu else ""
        lines.append(f"{seconds}{until}  {work}" if estimated else work)
        expected = _expected(case, gpu)
        if expected:
            lines.append(f"{'':19}predicted on an {gpu}: {expected}")
    rows = sum(len(case.planned_rows()) for case in cases)
    lines.append(f"{len(cases)} cases, {rows} rows")
    return "\n".join(lines)


def _expected(case: Case, gpu: str) -> str:
    """Predictions of the case's rows."""
    found = []
    for row in case.planned_rows().values():
        expected = predict_for(row, gpu)
        if expected:
            direction = f"{row.direction} " if len(case.directions) > 1 else ""
            found.append(f"{direction}{row.provider} {expected}")
    return "; ".join(found)


def format_reasons(rows: Iterable[Row]) -> str:
    """Why there is no time, or why it is not one of a replay, once for each provider and reason."""
    rows = list(rows)
    counts = Counter((row.provider, row.status, row.reason) for row in rows if row.status != "ok")
    counts += Counter((row.provider, "timed", row.timed) for row in rows if row.timed.startswith(CALLED))
    return "\n".join(
        f"{provider}: {status} ({count} rows): {reason}" for (provider, status, reason), count in sorted(counts.items())
    )
