"""The README's figure: training steps at five resolutions, as bars of SVG."""

from __future__ import annotations

import html
from collections.abc import Container, Sequence

from opensora_fast.costs.hardware import DATASHEETS

from ..rows import Row
from .training_lines import FRAMES, PEERS, PUBLISHED_ON, Line

NOT_MEASURED, NOTHING = "not measured yet", "–"
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 860, 17, 3, 70, 200, 62
BETWEEN = 12  # resolutions
STYLE = """
text { font: 13px system-ui, "Segoe UI", sans-serif; fill: #1d2733; } .soft { fill: #5b6b7c; }
.title { font-weight: 600; }
.paper { fill: #ffffff; } .limit { fill: none; stroke: #5b6b7c; stroke-dasharray: 4 3; } .ours { fill: #0b6bcb; }
.peer { fill: #8a97a5; } .given { fill: #d9822b; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .soft { fill: #9aa9b8; } .paper { fill: #16202b; }
  .limit { stroke: #9aa9b8; } .ours { fill: #6ab0ff; } }
"""

Bar = tuple[str, float | None, str, str]  # class, value, label, what stands there in place of a value


def thousands(tokens_per_s: float | None) -> str:
    """Tokens/s in thousands, `NOTHING` for none."""
    if tokens_per_s is None:
        return NOTHING
    return f"{tokens_per_s / 1e3:.1f}" if tokens_per_s < 1e5 else f"{tokens_per_s / 1e3:.0f}"


def wrong(what: str) -> str:
    """In place of the speed of what was measured and refused."""
    return f"wrong {what}, no time"


def build_figure(lines: Sequence[Line]) -> str:
    """Bars as SVG, the same bytes for the same rows: no library draws it."""
    peers = {
        (on.gpu, attribute)
        for line in lines
        for on in line.measured
        for attribute, _ in PEERS
        if getattr(on, attribute) or attribute in on.refused
    }
    groups = [(line.resolution, _bars(line, peers)) for line in lines]
    most = max(value for _, bars in groups for _, value, _, _ in bars if value is not None)
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
        for place, (kind, value, label, lacking) in enumerate(bars):
            top = y + (BAR + GAP) * place
            length = 0.0 if value is None else value * scale
            if value is not None:
                parts.append(f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>')
            text = f"{label}: {lacking if value is None else thousands(value)}"
            parts.append(_text(LEFT + length + 7, top + 13, text, "soft" if value is None or kind == "limit" else ""))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bars(line: Line, peers: Container[tuple[str, str]]) -> list[Bar]:
    """The limit, ours and its peers on each GPU, then what was published; GPUs of the same rates have one limit.

    Args:
        peers: (GPU, attribute of PEERS) that were measured at any resolution, right or wrong.
    """
    bars: list[Bar] = []
    published = f"Open-Sora on {PUBLISHED_ON}, published"
    alike = False
    for on in line.measured:
        same = DATASHEETS[on.gpu].is_like(DATASHEETS[PUBLISHED_ON])
        alike |= same
        names = f"{on.gpu} and {PUBLISHED_ON}" if same else on.gpu
        bars.append(("limit", on.floor, f"limit of {names}", ""))
        bars.append(("ours", _speed(on.ours), f"ours on {on.gpu}", NOT_MEASURED))
        for attribute, name in PEERS:
            if (on.gpu, attribute) in peers:
                lacking = wrong(on.refused[attribute]) if attribute in on.refused else NOT_MEASURED
                bars.append(("peer", _speed(getattr(on, attribute)), f"{name}, same {on.gpu}", lacking))
    if not alike:
        bars.append(("limit", line.published_floor, f"limit of {PUBLISHED_ON}", ""))
    return [*bars, ("given", line.published, published, "none")]


def _speed(row: Row | None) -> float | None:
    return row.tokens_per_s if row else None


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(text)}</text>'
