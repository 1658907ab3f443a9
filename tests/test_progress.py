"""Progress: plain lines off a terminal, a bar on one, standard error by default."""

import io

import pytest

from opensora_fast.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_name_work_count_and_fields():
    stream = io.StringIO()
    with Progress("decode clips", total=3, unit="clips", stream=stream, seconds_between_lines=0.0) as progress:
        progress.advance(1, loss="0.12")
        progress.advance(2, loss="0.10")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("decode clips: 3 clips")
    assert lines[1].startswith("decode clips: 1/3 clips") and lines[1].endswith("loss 0.12")
    assert lines[-1].startswith("decode clips: 3/3 clips") and lines[-1].endswith("loss 0.10")


def test_plain_lines_are_rare():
    stream = io.StringIO()
    with Progress("count", total=1000, stream=stream, seconds_between_lines=60.0) as progress:
        for _ in range(1000):
            progress.advance()
    assert len(stream.getvalue().splitlines()) == 2


def test_unknown_total_and_standard_error(capsys):
    with Progress("scan") as progress:
        progress.advance(5)
        progress.note("a remark")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a remark" in captured.err and "scan: 5," in captured.err


def test_an_error_passes_through_and_is_marked():
    stream = io.StringIO()
    with pytest.raises(KeyError):
        with Progress("work", total=2, stream=stream) as progress:
            progress.advance()
            raise KeyError("boom")
    assert stream.getvalue().splitlines()[-1].endswith("(stopped)")


def test_bar_on_a_terminal():
    stream = Terminal()
    with Progress("work [1]", total=2, unit="clips", stream=stream) as progress:
        progress.advance(2, loss="0.5")
        progress.note("a [remark]")
    text = stream.getvalue()
    assert "work [1]" in text and "2/2" in text and "loss 0.5" in text and "a [remark]" in text


def test_a_note_on_a_terminal_is_what_was_written():
    """Paths are copied from it: no line break at the width of the terminal, no `:100:` read as an emoji."""
    stream = Terminal()
    text = "bad clip: " + "clips/" * 30 + "ca:100:r [bold].mp4"
    with Progress("work", total=2, stream=stream) as progress:
        progress.note(text)
    assert f"{text}\n" in stream.getvalue()
