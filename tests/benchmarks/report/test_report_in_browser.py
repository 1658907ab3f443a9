"""The report and the demo's page in a real browser: they render, complain about nothing, and the tables filter."""

import time

import pytest
import torch
from bench_toys import make_row
from gpu_like_rows import gpu_like_rows
from page_in_browser import open_browser

from opensora_fast.benchmarks.report.page import ROW_COLUMNS, write_report
from opensora_fast.benchmarks.rows import append_rows, level_path
from opensora_fast.cli._demo_report import write_demo_report
from opensora_fast.data.buckets.explain import BucketLine, Explanation
from opensora_fast.data.video_files import save_video
from opensora_fast.html_report import SHOWN_ROWS

TYPING_S = 2.0  # for one word, on a busy machine; a quiet one takes a tenth


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    for row_file in {level_path(folder, row.level) for row in gpu_like_rows()}:
        append_rows(row_file, [row for row in gpu_like_rows() if level_path(folder, row.level) == row_file])
    return write_report(folder)


def test_what_a_page_does_wrong_is_seen(page, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<figure><svg width=0 height=0></svg></figure><img src='http://127.0.0.1:9/x.png'><script>nothing()</script>"
    )
    page.open(path)
    assert any("nothing is not defined" in message for message in page.complaints())
    assert page.requests() == ["http://127.0.0.1:9/x.png"]
    assert len(page.invisible()) == 1


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_it_renders_and_needs_nothing_from_elsewhere(page, report, width, dark):
    page.open(report, width, dark)
    assert page.complaints() == [] and page.requests() == []
    assert page.invisible() == []
    assert page.run("return document.querySelectorAll('figure svg').length") >= 8
    assert page.run("return document.querySelectorAll('section').length") >= 12
    # Wide tables scroll in their own box; the page itself never sideways.
    assert page.run("return document.documentElement.scrollWidth") <= width
    ink, paper = page.run(
        "var text = getComputedStyle(document.querySelector('figure svg text')).fill;"
        "return [text, getComputedStyle(document.querySelector('section')).backgroundColor]"
    )
    assert (sum(_rgb(ink)) > sum(_rgb(paper))) == dark


def test_the_table_filters_thousands_of_rows_as_one_types(page, report):
    page.open(report)
    total = len(gpu_like_rows())
    assert total > 3000
    assert len(page.visible_rows("#all-rows")) == SHOWN_ROWS
    expected = [
        row for row in gpu_like_rows() if _has(row, "ours") and _has(row, "spatial_attention") and _has(row, "720p")
    ]
    start = time.perf_counter()
    page.type("#all-rows input", "spatial_attention OURS 720p")
    taken = time.perf_counter() - start
    visible = page.visible_rows("#all-rows")
    assert len(visible) == len(expected) > 3
    assert all("spatial_attention" in text and "ours" in text and "720p" in text for text in visible)
    assert (
        page.run("return document.querySelector('#all-rows output').textContent") == f"{len(expected)} of {total} rows"
    )
    assert taken < TYPING_S * 3, f"three words took {taken:.1f} s"
    page.type("#all-rows input", "no-such-word")
    assert page.visible_rows("#all-rows") == []
    page.type("#all-rows input", "step")
    page.run("document.querySelector('#all-rows button').click()")
    assert len(page.visible_rows("#all-rows")) > SHOWN_ROWS
    assert page.complaints() == []


def test_a_click_on_a_title_sorts(page, report):
    page.open(report)
    page.type("#all-rows input", "step training 240p×16 L=120")
    column = page.run(
        "var titles = [...document.querySelectorAll('#all-rows th')];"
        "var index = titles.findIndex(title => title.textContent === 'p50 ms'); titles[index].click(); return index"
    )
    script = (
        "return [...document.querySelectorAll('#all-rows tbody tr')].filter(row => row.offsetParent !== null)"
        ".map(row => row.cells[arguments[0]].textContent)"
    )
    times = [float(text) for text in page.run(script, column) if text]
    assert len(times) > 5 and times == sorted(times)
    page.run("document.querySelectorAll('#all-rows th')[arguments[0]].click()", column)
    assert [float(text) for text in page.run(script, column) if text] == sorted(times, reverse=True)


def test_text_of_rows_is_text(page, tmp_path):
    reason = "<script>console.error('not text')</script>"
    append_rows(tmp_path / "op.csv", [make_row(), make_row(provider="<b>x</b>").without_time("failed", reason)])
    page.open(write_report(tmp_path))
    page.type("#all-rows input", "console.error")
    assert len(page.visible_rows("#all-rows")) == 1
    assert page.complaints() == []
    assert page.run("return document.querySelectorAll('td b, td script').length") == 0


def test_the_page_of_the_demo(page, tmp_path):
    page.open(write_demo_page(tmp_path))
    assert page.complaints() == [] and page.requests() == []
    assert page.invisible() == []
    assert page.run("return document.querySelectorAll('figure svg').length") == 2
    assert page.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.run("return document.documentElement.scrollWidth") <= 1280
    page.type("input.filter", "240p")
    assert len(page.visible_rows(".filtered")) == 1


def write_demo_page(folder):
    """The demo's page of made-up losses, real files and made-up rows."""
    size = (48, 64)
    video = torch.rand(3, 4, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_video(folder / "clip.mp4", video, fps=8)
    bucket = BucketLine("240p", 4, "0.75", 240, 320, 5, 2, 2, 600)
    explanation = Explanation(6, 5, 2, 2, 1, False, [bucket], [], {"too short": 1}, [])
    metrics = [{"step": step, "loss": 1.0 / step, "tokens": 600} for step in range(1, 31)]
    rows = [
        make_row(op="spatial_attention", workload=f"length {length}", direction=direction, p50_ms=length / 100)
        for length in (16, 64)
        for direction in ("forward", "forward+backward")
    ]
    path = folder / "report.html"
    clips = [folder / "clip.mp4"]
    write_demo_report(path, explanation, metrics, clips, [(clips[0], "made of text")], {"spatial": rows}, "cpu", 1.0)
    return path


def _has(row, word):
    return any(word in str(value(row)).lower() for _, value in ROW_COLUMNS)


def _rgb(color):
    return [float(number) for number in color.removeprefix("rgb(").removesuffix(")").split(",")]
