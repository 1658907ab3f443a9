"""Bars that several sections of the report have: providers of the same work beside each other."""

from __future__ import annotations

import math

from opensora_fast.html_report import Bar

from ..rows import Row
from .results import Results, Work, check_share, error_text, is_ours, joined, time_text


def time_bars(results: Results, work: Work) -> list[Bar]:
    """Time and share of the limit of every provider, the fastest first; the full width is the limit."""
    bars = []
    replays = any(row.is_replayed for row in work.measured)
    for row in work.measured:
        share = share_of_width(results, row, work)
        unlike = "calls" if replays and not row.is_replayed else ""
        limit = "" if math.isnan(row.roofline_share) else f"{row.roofline_share:.0%}"
        kind = "ours" if is_ours(row) else "other"
        bars.append(
            Bar(
                row.provider,
                share,
                joined(time_text(row.p50_ms), limit, unlike),
                kind=kind,
                check=check_share(row),
                tip=joined(error_text(row), row.timed if unlike else ""),
            )
        )
    return bars + missing_bars(work)


def share_of_width(results: Results, row: Row, work: Work) -> float:
    """How long the bar of a row is: the full width is the floor, or the fastest where none is known."""
    floor = results.floor_ms(row)
    return work.measured[0].p50_ms / row.p50_ms if math.isnan(floor) else floor / row.p50_ms


def missing_bars(work: Work) -> list[Bar]:
    """Providers without a time: those that failed with their reason, the others by name."""
    bars, unavailable, reasons = [], [], []
    for (status, reason), providers in work.reasons.items():
        if status == "failed":
            bars.append(Bar("", None, "", f"{', '.join(providers)} failed: {reason}", "none"))
        else:
            unavailable += providers
            reasons.append(f"{', '.join(providers)}: {reason}")
    if unavailable:
        bars.append(Bar("", None, "", f"unavailable: {', '.join(unavailable)}", "none", tip="\n".join(reasons)))
    return bars
