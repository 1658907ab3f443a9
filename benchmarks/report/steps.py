"""Sections of the report about training steps, sampling steps and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.html_report import Bar, HtmlReport

from ..providers.variants import PEERS, WATERFALL
from ..rows import Row
from ..suites.scale import scale_of
from .bars import missing_bars, share_of_width, time_bars
from .mixed import compare_mixed
from .results import (
    Results,
    Work,
    check_share,
    error_text,
    gib,
    is_ours,
    joined,
    published_for,
    rate,
    timing_text,
)

TECHNIQUES = {
    "upstream": "Open-Sora 1.1 as shipped",
    "upstream-flash": "+ flash attention",
    "upstream-flash-stored": "+ activations kept, not recomputed",
    "eager": "+ packs and this project's order of operations, plain PyTorch",
    "ours-norms": "+ Triton norms, modulation and gates",
    "ours-norms-gelu": "+ Triton GELU",
    "ours-norms-gelu-temporal": "+ Triton temporal attention",
    "ours-norms-gelu-temporal-spatial": "+ Triton spatial attention",
    "ours": "+ Triton cross-attention: all kernels",
}
BETWEEN = [name for name in WATERFALL if name not in PEERS]  # shown in the waterfall alone
# A work with as many of these as any has, or with so many providers, is a comparison and gets a card.
KINDS_OF_PEERS = (("open-sora", "upstream"), ("compile",), ("ours",))  # how names begin
COMPARED = 4
PROJECTED_TO = "H800"
# Kinds of steps beside the plain one: title and what it is.
KINDS = {
    "with encoders": (
        "With VAE and T5",
        "Steps that encode their clips and captions themselves, as the published figures do.",
    ),
    "sustained": ("Sustained", "Many steps one after another, as clocks and temperature settle in training."),
}
MIXED_GOAL = 1.03


def has_waterfall(results: Results) -> bool:
    return _waterfall_work(results) is not None


def add_waterfall(report: HtmlReport, results: Results) -> None:
    work = _waterfall_work(results)
    assert work is not None
    report.paragraph(
        f"A training step of {work.first.workload} ({work.first.shape}, {work.first.dtype}), each technique on top of "
        f"the last. {_scale_text(results, work)} The thin bar is the error from float64 over what it may be."
    )
    bars, before, first = [], None, None
    rows = {row.provider: row for row in work.rows}
    for name in WATERFALL:
        row = rows.get(name)
        if row is None or row.status != "ok":
            reason = "not in these rows" if row is None else row.reason
            bars.append(Bar(TECHNIQUES[name], None, "not measured", f"`{name}` · {reason}", "none"))
            continue
        first = first or row
        gains = "" if before is None else f"×{row.tokens_per_s / before.tokens_per_s:.2f} on the one before"
        total = "" if first is row else f"×{row.tokens_per_s / first.tokens_per_s:.2f} on `{first.provider}`"
        detail = joined(f"`{name}`", gains, total, error_text(row), gib(row))
        kind = "ours" if is_ours(row) else "other"
        share = share_of_width(results, row, work)
        bars.append(Bar(TECHNIQUES[name], share, f"{rate(row.tokens_per_s)} tokens/s", detail, kind, check_share(row)))
        before = row
    report.bars(bars)


def _waterfall_work(results: Results) -> Work | None:
    works = [
        (sum(row.provider in WATERFALL for row in work.measured), work.first.tokens, index, work)
        for index, work in enumerate(results.works("step", ""))
    ]
    count, _, _, work = max(works, default=(0, 0, 0, None), key=lambda item: item[:3])
    return work if count >= 2 else None


def has_steps(results: Results) -> bool:
    return any(row.status == "ok" for row in results.select("step"))


def add_steps(report: HtmlReport, results: Results) -> None:
    compared = compared_steps(results.works("step", ""))
    uncompared = [work for work in results.works("step", "") if work not in compared and work.measured]
    text = "Forward, backward, optimizer and average of the weights, latents and text there already."
    if compared:
        text += f" {_scale_text(results, compared[0])} The thin bar is the error over what it may be."
    report.paragraph(text)
    if results.is_gpu and (compared or any(row.op for row in results.select("step"))):
        report.paragraph(
            "Hatched bars were not measured here. Open-Sora published its speeds for H800; they include the VAE and T5 "
            f"and recompute activations. A projection for {PROJECTED_TO} leaves matrix products as they are and slows "
            "what is bound by memory with the bandwidth: at best the counted bytes, at worst all that is not matrix "
            "products."
        )
    report.cards([_step_card(results, work) for work in compared])
    for op in dict.fromkeys(row.op for row in results.select("step") if row.op):
        works = [work for work in results.works("step", op) if work.measured]
        if works:
            title, text = KINDS.get(op, (op, ""))
            report.heading(title)
            if text:
                report.paragraph(text)
            report.cards([_step_card(results, work) for work in works])
    _add_mixed(report, results)
    if uncompared:
        report.heading("Other buckets and lengths")
        report.table(
            ["workload", "shape", "provider", "k tokens/s", "% of limit", "GiB", "error / limit"],
            [_step_line(row) for work in uncompared for row in work.measured],
            filtered=True,
        )


def _add_mixed(report: HtmlReport, results: Results) -> None:
    scale = scale_of(results.device)
    costs = compare_mixed(results.latest, scale.mixed_steps, scale.tokens)
    if not costs:
        return
    report.heading("Mixed packs")
    report.paragraph(
        "What a token costs in a pack of videos of different shapes, over what it costs in uniform packs of these "
        f"shapes, weighted as in the mixed one. At most ×{MIXED_GOAL:g} is the goal. The longer the bar, the "
        "cheaper the token."
    )
    cheapest = min(cost.mixed_ns for cost in costs)
    cards = []
    for pack in dict.fromkeys(cost.pack for cost in costs):
        bars = [
            Bar(
                cost.provider,
                cheapest / cost.mixed_ns,
                f"×{cost.ratio:.3f}",
                f"{cost.mixed_ns:,.0f} ns a token, {cost.uniform_ns:,.0f} ns in uniform packs",
                "ours" if cost.provider.startswith("ours") else "other",
            )
            for cost in sorted((cost for cost in costs if cost.pack == pack), key=lambda cost: cost.mixed_ns)
        ]
        cards.append((pack, next(item.text for item in scale.mixed_steps if item.name == pack), bars))
    report.cards(cards)


def _step_card(results: Results, work: Work) -> tuple[str, str, list[Bar]]:
    work = Work(tuple(row for row in work.rows if row.provider not in BETWEEN))
    bars = [_speed_bar(results, row, work) for row in work.measured]
    floor = _floor_rate(results, work)
    top = floor or max((row.tokens_per_s for row in work.measured), default=math.nan)
    if results.is_gpu:
        for published in published_for(work.first.workload):
            share = published.tokens_per_s / top
            bars.append(
                Bar(
                    "Open-Sora on H800",
                    share,
                    rate(published.tokens_per_s),
                    f"published, {published.text}, with VAE and T5",
                    "given",
                )
            )
        ours, target = work.ours, DATASHEETS[PROJECTED_TO]
        projected = results.project_step(ours, target) if ours else None
        if projected:
            low, high = projected
            span = f"{low / 1e3:.0f}" if f"{low:.2e}" == f"{high:.2e}" else f"{low / 1e3:.0f}–{high / 1e3:.0f}"
            bars.append(
                Bar(
                    f"ours, {target.name}",
                    low / top,
                    f"{span} k",
                    f"projection from this {results.device_name}, not measured",
                    "given",
                )
            )
    text = joined(work.first.shape, f"floor {rate(floor)} tokens/s" if floor else "no floor is known")
    title = joined(work.first.workload, work.first.op)
    return title, text, bars + missing_bars(work)


def _speed_bar(results: Results, row: Row, work: Work) -> Bar:
    base = work.of("upstream-flash") or work.of("upstream")
    gain = f"×{row.tokens_per_s / base.tokens_per_s:.2f} on {base.provider}" if base and base is not row else ""
    limit = "" if math.isnan(row.roofline_share) else f"{row.roofline_share:.0%} of the limit"
    kind = "ours" if is_ours(row) else "other"
    share = share_of_width(results, row, work)
    detail = joined(limit, gain, gib(row))
    return Bar(row.provider, share, rate(row.tokens_per_s), detail, kind, check_share(row), error_text(row))


def _step_line(row: Row) -> list[object]:
    return [
        row.workload,
        row.shape,
        row.provider,
        row.tokens_per_s / 1e3,
        "" if math.isnan(row.roofline_share) else round(100 * row.roofline_share, 1),
        round(row.memory_bytes / 2**30, 2) if row.memory_bytes else "",
        "" if check_share(row) is None else round(row.error / row.error_limit, 2),
    ]


def has_sampling(results: Results) -> bool:
    return any(row.status == "ok" for row in results.select("sampling"))


def add_sampling(report: HtmlReport, results: Results) -> None:
    report.paragraph(
        "One guided sampling step: the model on twice the videos, guidance, and the draw of the next latents."
    )
    report.cards([_plain_card(results, work) for work in results.works("sampling") if work.measured])


def has_blocks(results: Results) -> bool:
    return any(row.status == "ok" for row in results.select("block"))


def add_blocks(report: HtmlReport, results: Results) -> None:
    works = [work for work in results.works("block") if work.measured]
    timing = timing_text(row for work in works for row in work.measured)
    report.paragraph(f"One of the model's blocks: time, and share of the limit where one is known. {timing}")
    report.cards([_plain_card(results, work) for work in works])


def _plain_card(results: Results, work: Work) -> tuple[str, str, list[Bar]]:
    title = joined(work.first.workload, work.first.op, work.first.direction)
    return title, work.first.shape, time_bars(results, work)


def _floor_rate(results: Results, work: Work) -> float | None:
    """Tokens/s at the counted floor."""
    times = [results.floor_ms(row) for row in work.measured]
    return work.first.tokens / times[0] * 1e3 if times and not math.isnan(times[0]) else None


def _scale_text(results: Results, work: Work) -> str:
    """What the full width of a bar is."""
    if _floor_rate(results, work) is None:
        return "The full width of a bar is the fastest."
    source = results.limit_text(work.first.dtype)
    return f"The full width of a bar is the floor: what counted operations and bytes allow at {source}."


def compared_steps(works: Sequence[Work]) -> list[Work]:
    """Comparisons: for each workload that with the most kinds of peers, then the most providers, then tokens.

    A work with fewer kinds of peers than another one, and with few providers, is none.
    """
    best: dict[str, Work] = {}
    for work in works:
        name = work.first.workload
        if name not in best or _weight(work) > _weight(best[name]):
            best[name] = work
    most = max(map(_count_kinds, best.values()), default=0)
    return [work for work in best.values() if _count_kinds(work) == most > 1 or len(work.rows) >= COMPARED]


def _weight(work: Work) -> tuple[int, int, int]:
    return _count_kinds(work), len(work.rows), work.first.tokens


def _count_kinds(work: Work) -> int:
    return sum(any(row.provider.startswith(kind) for row in work.rows) for kind in KINDS_OF_PEERS)


def best_step(results: Results) -> Row | None:
    """Our fastest training step among those that the most kinds of others were compared at."""
    works = compared_steps(results.works("step", ""))
    most = max(map(_count_kinds, works), default=0)
    rows = [work.ours for work in works if work.ours and _count_kinds(work) == most]
    return max(rows, key=lambda row: row.tokens_per_s, default=None)


def speed_ups(results: Results, peers: Sequence[str]) -> list[tuple[str, float]]:
    """(workload, our speed over that of the fastest of the peers) wherever both were measured."""
    found = []
    for work in compared_steps(results.works("step", "")):
        ours = work.ours
        other = next((row for row in work.measured if row.provider in peers), None)
        if ours and other:
            found.append((work.first.workload, ours.tokens_per_s / other.tokens_per_s))
    return found


def unmeasured_resolutions(results: Results, resolutions: Sequence[str]) -> list[str]:
    """Resolutions without a training step of ours."""
    have = {row.workload.partition("×")[0] for row in results.select("step", "") if row.status == "ok" and is_ours(row)}
    return [name for name in resolutions if name not in have]
