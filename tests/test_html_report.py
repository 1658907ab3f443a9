"""A report is one page that needs nothing else, and text in it is text."""

import re

import pytest

from opensora_fast.html_report import HtmlReport


def test_a_page_holds_everything_and_escapes_text(tmp_path):
    report = HtmlReport("Title <b>", "lead & more")
    report.section("One", "a < b")
    report.numbers([("speed", "3 k")])
    report.pictures([(b"\x89PNG", "a picture")])
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"mp4")
    report.clips([(clip, "a clip")])
    report.table(["name", "value"], [["<script>", 1.5], ["x", 2]], filtered=True)
    report.section("Two")
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Title &lt;b&gt;" in page and "lead &amp; more" in page and "a &lt; b" in page
    assert page.count("<section ") == page.count("</section>") == 2
    assert "&lt;script&gt;" in page and page.count("<script>") == 1
    assert not re.search(r'(?:src|href)="?(?!data:)[a-z]+:', page)
    assert "<td class=number>1.5</td>" in page


def test_a_page_that_a_full_disk_does_not_take_leaves_the_one_before(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    (tmp_path / ".report.html.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*report\.html'"):
        HtmlReport("Title", "lead").write(path)
    assert path.read_text() == "before"
