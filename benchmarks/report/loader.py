"""Section of the report about decoding, and putting clips into buckets."""

from __future__ import annotations

from opensora_fast.html_report import Bar, HtmlReport

from ..rows import Row
from ..shapes import SIZES, Workload
from .results import Results, check_share, error_text, rate, time_text


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
