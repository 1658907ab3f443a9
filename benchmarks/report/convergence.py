"""Section of the report about training with the kernels and with the reference: loss curves, and how far apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opensora_fast.html_report import Bar, HtmlReport

from ..jobs.convergence import EAGER, PERTURBED, Curve, read_curves, smooth
from ..rows import Row
from .bars import missing_bars
from .figures import color_of, plot_lines
from .results import Results, check_share, is_ours

WINDOW = 20  # steps of the moving average, where no row says it
GRAY = "#8c8c8c"
SMALLEST = 1e-9  # of a distance on a logarithmic axis


def has_convergence(results: Results) -> bool:
    return bool(results.select("convergence"))


def add_convergence(report: HtmlReport, results: Results) -> None:
    report.paragraph(
        "A small model is trained on the demo's clips with the reference and with the kernels, at equal seeds. How far "
        "the smoothed loss curves are apart, relative, is held against the distance between two seeds, and against "
        "what a change of the initial weights by one rounding does. The full width of a bar is what it may be."
    )
    cards = []
    for work in results.works("convergence"):
        bars = [_bar(row) for row in work.measured]
        cards.append((f"{work.first.workload}, {work.first.dtype}", work.first.direction, bars + missing_bars(work)))
    report.cards(cards)
    for name, curves in read_curves(results.folder).items():
        report.heading(f"Loss curves of {name}")
        present = dict.fromkeys(curve.provider for curve in curves)
        report.legend([(provider, _color(provider)) for provider in present] + [("two seeds of eager", GRAY)])
        window = min(_window(results), max(min(len(curve.loss) for curve in curves) // 2, 1))
        losses = [
            (f"{curve.provider}, seed {curve.seed}", smooth(curve.loss, window), _color(curve.provider))
            for curve in curves
        ]
        figures = [(plot_lines(losses, "loss"), f"Mean of {window} steps; a line for each provider and seed.")]
        distances = _distances(curves, window)
        if distances:
            figures.append(
                (
                    plot_lines(distances, "relative distance", log=True),
                    f"Distance from eager at equal seed; none at all is drawn at {SMALLEST:g}.",
                )
            )
        report.figures(figures)


def worst_convergence(results: Results) -> Row | None:
    """The row nearest to its limit."""
    rows = [row for row in results.select("convergence") if row.status == "ok" and is_ours(row)]
    return max(rows, key=lambda row: check_share(row) or 0.0, default=None)


def _bar(row: Row) -> Bar:
    detail = f"{row.error:.2e} of at most {row.error_limit:.2e} · {row.checked_on}"
    share = check_share(row) or 0.0
    return Bar(row.provider, share, f"{share:.1%}", detail, "ours" if is_ours(row) else "other")


def _window(results: Results) -> int:
    for row in results.select("convergence"):
        found = re.search(r"mean of (\d+)", row.checked_on)
        if found:
            return int(found[1])
    return WINDOW


def _distances(curves: Sequence[Curve], window: int) -> list[tuple[str, list[float], str]]:
    """Of every other run from eager's of its seed, and of eager's seeds from each other."""
    eager = {curve.seed: smooth(curve.loss, window) for curve in curves if curve.provider == EAGER}
    lines = []
    seeds = sorted(eager)
    for index, seed in enumerate(seeds):
        for other in seeds[index + 1 :]:
            lines.append((f"eager, seeds {seed} and {other}", _apart(eager[seed], eager[other]), GRAY))
    for curve in curves:
        if curve.provider != EAGER and curve.seed in eager:
            apart = _apart(smooth(curve.loss, window), eager[curve.seed])
            lines.append((f"{curve.provider}, seed {curve.seed}", apart, _color(curve.provider)))
    return lines


def _apart(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [max(abs(a - b) / abs(b), SMALLEST) for a, b in zip(first, second, strict=False)]


def _color(provider: str) -> str:
    return "#b8860b" if provider == PERTURBED else color_of(provider)
