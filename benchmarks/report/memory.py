"""Section of the report about the memory of training steps."""

from __future__ import annotations

from opensora_fast.html_report import Bar, HtmlReport

from .bars import missing_bars
from .results import Results, Work, gib, is_ours, rate
from .steps import compared_steps


def has_memory(results: Results) -> bool:
    return any(row.memory_bytes and row.status == "ok" for row in results.select("step", ""))


def add_memory(report: HtmlReport, results: Results) -> None:
    report.paragraph(
        "Peak of all allocated GPU memory during a training step: weights, optimizer, average of the weights and "
        "activations. The full width of a bar is the largest peak of these."
    )
    works = [work for work in results.works("step", "") if any(row.memory_bytes for row in work.measured)]
    compared = compared_steps(works)
    largest = max(row.memory_bytes for work in compared or works for row in work.measured)
    report.cards([_memory_card(work, largest) for work in compared])
    others = [work for work in works if work not in compared]
    if others:
        report.table(
            ["bucket", "shape", "provider", "GiB", "KiB per token"],
            [
                [
                    row.workload,
                    row.shape,
                    row.provider,
                    round(row.memory_bytes / 2**30, 2),
                    row.memory_bytes / 1024 / row.tokens if row.tokens else "",
                ]
                for work in others
                for row in work.measured
            ],
            filtered=True,
        )


def _memory_card(work: Work, largest: int) -> tuple[str, str, list[Bar]]:
    rows = sorted((row for row in work.measured if row.memory_bytes), key=lambda row: row.memory_bytes)
    bars = [
        Bar(
            row.provider,
            row.memory_bytes / largest,
            gib(row),
            kind="ours" if is_ours(row) else "other",
            tip=f"{rate(row.tokens_per_s)} tokens/s",
        )
        for row in rows
    ]
    return work.first.workload, work.first.shape, bars + missing_bars(work)
