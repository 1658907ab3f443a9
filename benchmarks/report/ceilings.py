"""Section of the report about what the device can do: copies, matrix products, launches."""

from __future__ import annotations

from opensora_fast.html_report import Bar, HtmlReport

from .bars import missing_bars
from .results import Results, joined, time_text


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
