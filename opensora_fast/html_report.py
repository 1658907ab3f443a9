"""One self-contained HTML page out of text, figures, pictures, clips and tables: no script or style from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6b7c; --line: #d9e0e7; --paper: #ffffff; --back: #f3f6f9;
        --accent: #0b6bcb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa9b8; --line: #2c3947; --paper: #16202b;
        --back: #0e151d; --accent: #6ab0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; } .lead { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
          margin-top: 18px; }
figure { margin: 12px 0 4px; } figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
figure svg, figure img, figure video { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.side { display: flex; flex-wrap: wrap; gap: 18px; } .side figure { flex: 1 1 220px; }
.numbers { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 8px 0; }
.numbers div span { display: block; color: var(--soft); font-size: 13px; }
.numbers div b { font-size: 22px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
input.filter { width: 100%; padding: 8px 10px; margin: 4px 0 12px; border: 1px solid var(--line); border-radius: 6px;
               background: var(--back); color: var(--ink); font: inherit; }
code { font: 13px ui-monospace, monospace; background: var(--back); padding: 1px 5px; border-radius: 4px; }
"""

# Rows of a filtered table stay when they hold every word of the box.
FILTER_SCRIPT = """
document.querySelectorAll('input.filter').forEach(function (box) {
  var rows = box.parentElement.querySelectorAll('tbody tr');
  box.addEventListener('input', function () {
    var words = box.value.toLowerCase().split(/\\s+/);
    rows.forEach(function (row) {
      var text = row.textContent.toLowerCase();
      row.hidden = !words.every(function (word) { return text.includes(word); });
    });
  });
});
"""


class HtmlReport:
    """Collects sections in order; `write` makes the page. All text is escaped."""

    def __init__(self, title: str, lead: str):
        self._title = title
        self._lead = lead
        self._parts: list[str] = []
        self._open = False

    def section(self, title: str, text: str = "") -> None:
        """Starts a section; what is added afterwards belongs to it."""
        self._close()
        self._parts.append(f"<section><h2>{html.escape(title)}</h2>")
        self._open = True
        if text:
            self.paragraph(text)

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def numbers(self, values: Sequence[tuple[str, str]]) -> None:
        """Large figures in a line: (label, value)."""
        cells = "".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for label, value in values
        )
        self._parts.append(f'<div class="numbers">{cells}</div>')

    def figure(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure, as SVG inside the page."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        svg = buffer.getvalue()
        self._parts.append(_figure(svg[svg.index("<svg") :], caption))

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
        """A table; numbers are aligned to the right. `filtered` puts a search box above it."""
        rows = [list(row) for row in rows]
        numeric = [
            bool(rows) and all(isinstance(row[index], (int, float)) for row in rows) for index in range(len(columns))
        ]

        def cell(tag: str, value: object, is_number: bool) -> str:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            return f"<{tag}{' class=number' if is_number else ''}>{html.escape(text)}</{tag}>"

        head = "".join(cell("th", name, number) for name, number in zip(columns, numeric, strict=True))
        body = "".join(
            "<tr>" + "".join(cell("td", value, number) for value, number in zip(row, numeric, strict=True)) + "</tr>"
            for row in rows
        )
        box = (
            '<input class="filter" type="search" placeholder="filter rows" aria-label="filter rows">'
            if filtered
            else ""
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<div>{box}<div class="scroll">{table}</div></div>')

    def write(self, path: Path) -> None:
        self._close()
        path.write_text(
            "<!doctype html><html lang=en><head><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
            f"<title>{html.escape(self._title)}</title><style>{STYLE}</style></head><body><main>"
            f"<h1>{html.escape(self._title)}</h1><p class=lead>{html.escape(self._lead)}</p>"
            f"{''.join(self._parts)}</main><script>{FILTER_SCRIPT}</script></body></html>\n",
            encoding="utf-8",
        )

    def _side_by_side(self, figures: Iterable[str]) -> None:
        self._parts.append(f'<div class="side">{"".join(figures)}</div>')

    def _close(self) -> None:
        if self._open:
            self._parts.append("</section>")
            self._open = False


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
