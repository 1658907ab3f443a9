"""A report is one page that needs nothing else, and text in it is text."""

import re

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
