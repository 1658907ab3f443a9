"""Style and script of the pages that `html_report` writes."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6b7c; --line: #d9e0e7; --paper: #ffffff; --back: #f3f6f9;
        --accent: #0b6bcb; --other: #a9b6c4; --warn: #b45309; --warn-back: #fff5e5; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa9b8; --line: #2c3947; --paper: #16202b;
        --back: #0e151d; --accent: #6ab0ff; --other: #5d6e80; --warn: #f0b35b; --warn-back: #2d2416;
        --good: #5fcf95; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 0 0 12px; max-width: 80ch; overflow-wrap: anywhere; } .lead, .soft { color: var(--soft); }
.lead { max-width: none; } .soft { font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13.5px; } a { color: var(--accent); }
nav a { text-decoration: none; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
          margin-top: 18px; scroll-margin-top: 8px; }
.note { background: var(--warn-back); border-left: 4px solid var(--warn); border-radius: 4px; padding: 8px 14px;
        max-width: none; margin: 10px 0; }
figure { margin: 12px 0 4px; } figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
figure svg, figure img, figure video { max-width: 100%; height: auto; border-radius: 6px; }
figure svg { fill: currentColor; } figure svg text { font-family: inherit !important; }
.side { display: flex; flex-wrap: wrap; gap: 18px; } .side figure { flex: 1 1 320px; min-width: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 14px 22px;
           margin: 8px 0 14px; }
.numbers div span { display: block; color: var(--soft); font-size: 13px; line-height: 1.4; }
.numbers div b { font-size: 24px; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin: 10px 0 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
            vertical-align: -1px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 14px;
         margin: 8px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.card h3 { margin: 0; } .card p { margin: 0 0 8px; }
.bars { display: grid; grid-template-columns: fit-content(38%) minmax(40px, 1fr) auto; gap: 0 12px; align-items: center;
        font-size: 13.5px; line-height: 1.35; }
.bar { display: contents; } .bar > span { overflow-wrap: anywhere; padding: 4px 0 2px; }
.bar b { font-variant-numeric: tabular-nums; font-weight: 600; text-align: right; }
.bar em { display: block; background: var(--back); border-radius: 3px; }
.bar i, .bar u { display: block; height: 12px; border-radius: 3px; background: var(--other); min-width: 2px; }
.bar u { height: 3px; margin-top: 2px; background: var(--good); }
.bar small { grid-column: 1 / -1; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; margin-bottom: 3px; }
.bar.ours i { background: var(--accent); } .bar.ours span { font-weight: 600; }
.bar.given i { background: repeating-linear-gradient(135deg, var(--warn) 0 4px, transparent 4px 8px);
               border: 1px solid var(--warn); }
.bar.none b { color: var(--soft); font-weight: 400; } .bar.none em { background: none; }
.card .bars { font-size: 13px; } .card .bar b { font-size: 12.5px; }
.scroll { overflow-x: auto; } .filtered .scroll { max-height: 520px; overflow-y: auto; }
.filtered th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 11px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } .filtered th { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
td { max-width: 420px; overflow: hidden; text-overflow: ellipsis; }
input.filter { width: 100%; padding: 8px 10px; margin: 4px 0 8px; border: 1px solid var(--line); border-radius: 6px;
               background: var(--back); color: var(--ink); font: inherit; }
button { font: inherit; color: var(--accent); background: none; border: 0; padding: 0; cursor: pointer; }
code { font: 13px ui-monospace, monospace; background: var(--back); padding: 1px 5px; border-radius: 4px; }
@media (max-width: 520px) { main { padding: 20px 10px 40px; } section { padding: 14px 12px; } h1 { font-size: 22px; }
  .bars { display: block; } .bar { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 8px;
          align-items: end; padding-top: 3px; }
  .bar em { grid-column: 1 / -1; grid-row: 2; }
  .numbers { grid-template-columns: 1fr 1fr; } .numbers div b { font-size: 20px; } }
"""

# Rows of a filtered table stay when they hold every word of the box. Of those, the first are laid out, and more on
# demand: with thousands, typing would be slow.
FILTER_SCRIPT = """
document.querySelectorAll('.filtered').forEach(function (part) {
  var box = part.querySelector('input'), count = part.querySelector('output'), more = part.querySelector('button');
  var body = part.querySelector('tbody'), titles = Array.from(part.querySelectorAll('th'));
  var rows = Array.from(body.rows), texts = null, step = Number(part.dataset.shown), most = step;
  function show() {
    texts = texts || new Map(rows.map(function (row) {
      return [row, Array.from(row.cells, function (cell) { return cell.textContent; }).join(' ').toLowerCase()];
    }));
    var words = box.value.toLowerCase().split(/\\s+/), found = 0;
    rows.forEach(function (row) {
      var hit = words.every(function (word) { return texts.get(row).includes(word); });
      found += hit;
      row.hidden = !hit || found > most;
    });
    more.hidden = found <= most;
    more.textContent = 'show ' + Math.min(step, found - most) + ' more';
    count.textContent = found + ' of ' + rows.length + ' rows' + (found > most ? ', the first ' + most + ' shown' : '');
  }
  function sort(column, title) {
    var rising = title.getAttribute('aria-sort') !== 'ascending';
    titles.forEach(function (other) { other.removeAttribute('aria-sort'); });
    title.setAttribute('aria-sort', rising ? 'ascending' : 'descending');
    var keys = new Map(rows.map(function (row) { return [row, row.cells[column].textContent]; }));
    var numeric = title.classList.contains('number'), sign = rising ? 1 : -1;
    rows.sort(function (one, two) {
      var a = keys.get(one), b = keys.get(two);
      if (!a || !b) return !a - !b;
      return sign * (numeric ? a - b : a.localeCompare(b));
    });
    body.append.apply(body, rows);
    show();
  }
  box.addEventListener('input', function () { most = step; show(); });
  more.addEventListener('click', function () { most += step; show(); });
  titles.forEach(function (title, column) { title.addEventListener('click', function () { sort(column, title); }); });
  show();
});
"""
