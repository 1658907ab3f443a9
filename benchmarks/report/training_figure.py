"""The README's figure: training steps at five resolutions, as bars of SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence

from opensora_fast.costs.hardware import DATASHEETS

from .training_lines import FRAMES, PUBLISHED_ON, Line

NOT_MEASURED = "not measured yet"
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 860, 17, 3, 70, 200, 62
BETWEEN = 12  # resolutions
STYLE = """
text { font: 13px system-ui, "Segoe UI", sans-serif; fill: #1d2733; } .soft { fill: #5b6b7c; }
.title { font-weight: 600; }
.paper { fill: #ffffff; } .limit { fill: none; stroke: #5b6b7c; stroke-dasharray: 4 3; } .ours { fill: #0b6bcb; }
.given { fill: #d9822b; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .soft { fill: #9aa9b8; } .paper { fill: #16202b; }
  .limit { stroke: #9aa9b8; } .ours { fill: #6ab0ff; } }
"""

Bar = tuple[str, float | None, str]  # class, value, label


def thousands(tokens_per_s: float | None) -> str:
    """Tokens/s in thousands, "–" for none."""
    if tokens_per_s is None:
        return "–"
    return f"{tokens_per_s / 1e3:.1f}" if tokens_per_s < 1e5 else f"{tokens_per_s / 1e3:.0f}"


def build_figure(lines: Sequence[Line]) -> str:
    """Bars as SVG, the same bytes for the same rows: no library draws it."""
    groups = [(line.resolution, _bars(line)) for line in lines]
    most = max(value for _, bars in groups for _, value, _ in bars if value is not None)
    scale = (WIDTH - LEFT - RIGHT) / most
    group = (BAR + GAP) * len(groups[0][1]) + BETWEEN
    height = TOP + group * len(groups) + 6
    parts = [
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        _text(16, 26, f"A training step of {FRAMES} frames, thousand tokens/s on one GPU", "title"),
        _text(16, 46, "limits are counted, not measured; published figures include VAE and T5", "soft"),
    ]
    for index, (resolution, bars) in enumerate(groups):
        y = TOP + group * index
        parts.append(_text(16, y + 0.5 * group - 2, resolution, "title"))
        for place, (kind, value, label) in enumerate(bars):
            top = y + (BAR + GAP) * place
            length = 0.0 if value is None else value * scale
            if value is not None:
                parts.append(f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>')
            lacking = NOT_MEASURED if kind == "ours" else "none"
            text = f"{label}: {lacking if value is None else thousands(value)}"
            parts.append(_text(LEFT + length + 7, top + 13, text, "soft" if value is None or kind == "limit" else ""))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bars(line: Line) -> list[Bar]:
    """The limit and ours of each GPU, then what was published; GPUs of the same rates have one limit."""
    bars: list[Bar] = []
    published = f"Open-Sora on {PUBLISHED_ON}, published"
    alike = False
    for on in line.measured:
        same = DATASHEETS[on.gpu].is_like(DATASHEETS[PUBLISHED_ON])
        alike |= same
        names = f"{on.gpu} and {PUBLISHED_ON}" if same else on.gpu
        bars.append(("limit", on.floor, f"limit of {names}"))
        bars.append(("ours", on.ours.tokens_per_s if on.ours else None, f"ours on {on.gpu}"))
    if not alike:
        bars.append(("limit", line.published_floor, f"limit of {PUBLISHED_ON}"))
    return [*bars, ("given", line.published, published)]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(text)}</text>'
