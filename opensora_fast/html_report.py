"""One self-contained HTML page out of text, figures, pictures, clips and tables: no script or style from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_fast.files import write_whole
from opensora_fast.html_style import FILTER_SCRIPT, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows of a filtered table that are laid out at once: a browser lays out a hundred as one types, not thousands.
SHOWN_ROWS = 150
# The accent of the style, for figures: it becomes the page's own, which differs between light and dark.
ACCENT = "#0b6bcb"
_THEMED = {ACCENT: "var(--accent)", "#000000": "currentColor", "#ffffff": "var(--paper)"}


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart.

    Attributes:
        label: what it is.
        share: length, 0 to 1; None where there is nothing to show but the text.
        value: text behind the bar.
        detail: small text below.
        kind: "ours", "other", "given" (hatched: not measured here) or "none" (no bar).
        check: length of a second, thin bar: an error over its limit.
        tip: text of a tooltip.
    """

    label: str
    share: float | None
    value: str
    detail: str = ""
    kind: str = "other"
    check: float | None = None
    tip: str = ""


class HtmlReport:
    """Collects sections in order; `write` makes the page. All text is escaped; `code` in backticks is set as such.

    Args:
        contents: put links to the sections at the top.
    """

    def __init__(self, title: str, lead: str, contents: bool = False):
        self._title = title
        self._lead = lead
        self._contents = contents
        self._parts: list[str] = []
        self._titles: list[str] = []
        self._open = False
        self._figures = 0

    def section(self, title: str, text: str = "") -> None:
        """Starts a section; what is added afterwards belongs to it."""
        self._close()
        self._titles.append(title)
        self._parts.append(f'<section id="{_anchor(title)}"><h2>{html.escape(title)}</h2>')
        self._open = True
        if text:
            self.paragraph(text)

    def heading(self, title: str) -> None:
        """Inside a section."""
        self._parts.append(f"<h3>{html.escape(title)}</h3>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{_escape(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that nobody may overlook."""
        self._parts.append(f'<p class="note">{_escape(text)}</p>')

    def numbers(self, values: Sequence[tuple[str, str]]) -> None:
        """Large figures in a line: (label, value)."""
        cells = "".join(
            f"<div><b>{html.escape(value)}</b><span>{_escape(label)}</span></div>" for label, value in values
        )
        self._parts.append(f'<div class="numbers">{cells}</div>')

    def bars(self, bars: Sequence[Bar]) -> None:
        """A bar chart."""
        self._parts.append(_bars(bars))

    def cards(self, cards: Sequence[tuple[str, str, Sequence[Bar]]]) -> None:
        """Bar charts beside each other: (title, small text, bars)."""
        content = "".join(
            f'<div class="card"><h3>{html.escape(title)}</h3><p class="soft">{_escape(text)}</p>{_bars(bars)}</div>'
            for title, text, bars in cards
        )
        self._parts.append(f'<div class="cards">{content}</div>')

    def legend(self, items: Iterable[tuple[str, str]]) -> None:
        """Colors of the figures that follow: (label, color)."""
        entries = "".join(
            f'<span><i style="background:{_THEMED.get(color, color)}"></i>{html.escape(label)}</span>'
            for label, color in items
        )
        self._parts.append(f'<div class="legend">{entries}</div>')

    def figure(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure, as SVG inside the page. An artist whose gid begins with "tip:" gets a tooltip."""
        self._parts.append(_figure(self._to_svg(figure), caption))

    def figures(self, figures: Iterable[tuple[Figure, str]]) -> None:
        """Figures beside each other: (figure, caption)."""
        self._side_by_side(_figure(self._to_svg(figure), caption) for figure, caption in figures)

    def pictures(self, pictures: Iterable[tuple[bytes, str]]) -> None:
        """PNG pictures beside each other: (bytes, caption)."""
        self._side_by_side(
            _figure(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{_encode(data)}">', caption)
            for data, caption in pictures
        )

    def clips(self, clips: Iterable[tuple[Path, str]]) -> None:
        """MP4 clips beside each other: (path, caption); they are stored inside the page."""
        self._side_by_side(
            _figure(
                "<video controls loop muted autoplay playsinline "
                f'src="data:video/mp4;base64,{_encode(path.read_bytes())}"></video>',
                caption,
            )
            for path, caption in clips
        )

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], filtered: bool = False) -> None:
        """A table; columns of numbers (and empty cells) are aligned to the right.

        Args:
            filtered: put a search box above it, and let a click on a title sort.
        """
        rows = [list(row) for row in rows]
        numeric = [_is_numeric([row[index] for row in rows]) for index in range(len(columns))]

        def line(row: Sequence[object], tag: str) -> str:
            return "".join(
                f"<{tag}{' class=number' if number else ''}>{_format(value)}</{tag}>"
                for value, number in zip(row, numeric, strict=True)
            )

        body = "".join(
            f"<tr{' hidden' if filtered and index >= SHOWN_ROWS else ''}>{line(row, 'td')}</tr>"
            for index, row in enumerate(rows)
        )
        table = f"<table><thead><tr>{line(columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"
        if not filtered:
            self._parts.append(f'<div class="scroll">{table}</div>')
            return
        self._parts.append(
            f'<div class="filtered" data-shown="{SHOWN_ROWS}">'
            '<input class="filter" type="search" placeholder="filter: rows that hold every word" '
            'aria-label="filter rows"><p class="soft"><output></output> '
            '<button type="button" hidden></button></p>'
            f'<div class="scroll">{table}</div></div>'
        )

    def write(self, path: Path) -> None:
        self._close()
        links = "".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title in self._titles)
        write_whole(
            path,
            "<!doctype html><html lang=en><head><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
            f"<title>{html.escape(self._title)}</title><style>{STYLE}</style>"
            "<noscript><style>tr[hidden] { display: table-row } .filtered > input { display: none }</style></noscript>"
            f"</head><body><main><h1>{html.escape(self._title)}</h1><p class=lead>{_escape(self._lead)}</p>"
            f"{f'<nav>{links}</nav>' if self._contents else ''}"
            f"{''.join(self._parts)}</main><script>{FILTER_SCRIPT}</script></body></html>\n",
        )

    def _to_svg(self, figure: Figure) -> str:
        from matplotlib import rc_context

        self._figures += 1
        buffer = io.StringIO()
        # Text stays text; names inside the SVG must differ between the figures of a page.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{self._title} {self._figures}"}):
            figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
        used = set(re.findall(r"#([\w-]+)", svg))
        svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
        for color, themed in _THEMED.items():
            svg = svg.replace(color, themed)
        return svg

    def _side_by_side(self, figures: Iterable[str]) -> None:
        self._parts.append(f'<div class="side">{"".join(figures)}</div>')

    def _close(self) -> None:
        if self._open:
            self._parts.append("</section>")
            self._open = False


def _bars(bars: Sequence[Bar]) -> str:
    lines = []
    for bar in bars:
        track = "" if bar.share is None else f'<i style="width:{_percent(bar.share)}"></i>'
        if bar.check is not None:
            track += f'<u style="width:{_percent(bar.check)}"></u>'
        tip = f' title="{html.escape(bar.tip)}"' if bar.tip else ""
        line = ""
        if bar.label or bar.value:
            line = f"<span>{html.escape(bar.label)}</span><em{tip}>{track}</em><b>{html.escape(bar.value)}</b>"
        small = f"<small{'' if line else tip}>{_escape(bar.detail)}</small>" if bar.detail else ""
        lines.append(f'<div class="bar {bar.kind}">{line}{small}</div>')
    return f'<div class="bars">{"".join(lines)}</div>'


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{_escape(caption)}</figcaption></figure>"


def _escape(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _is_numeric(values: Sequence[object]) -> bool:
    kinds = {isinstance(value, (int, float)) for value in values if value != ""}
    return kinds == {True}


def _format(value: object) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
