"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Show how far a loop has come.

        with Progress("decode clips", total=len(clips), unit="clips") as progress:
            for clip in clips:
                progress.advance(1, loss="0.12")

    On a terminal it is a rich bar; elsewhere (a log file, CI) a line at the start, one at most every
    `seconds_between_lines`, and one at the end. Keyword fields of `advance` are shown after the bar until replaced.

    Args:
        description: what is being done, in a few words.
        total: number of units, or None if it is not known beforehand.
        unit: what is counted, in the plural.
        stream: where to write; standard error at the time of the call by default.
        seconds_between_lines: shortest time between two plain lines.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "",
        *,
        stream: TextIO | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = 0
        self.fields: dict[str, str] = {}
        self._stream = stream
        self._seconds_between_lines = seconds_between_lines
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._stream = self._stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._start_bar()
        else:
            total = "" if self.total is None else f" {self.total}{self._unit_text()}"
            self._write_line(f"{self.description}:{total} ...")
        return self

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Count `amount` more units as done and show the given fields beside the bar."""
        self.completed += amount
        self.fields.update({name: str(value) for name, value in fields.items()})
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, fields=self._fields_text())
        elif time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._write_line(self._state_text())

    def note(self, text: str) -> None:
        """Write one line of text without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.out(text, highlight=False)
        else:
            self._write_line(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._write_line(self._state_text() + (" (stopped)" if kind is not None else ""))

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self.unit, markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}", markup=False),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task(self.description, total=self.total, completed=self.completed, fields="")
        self._bar.start()

    def _unit_text(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def _fields_text(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.fields.items())

    def _state_text(self) -> str:
        count = f"{self.completed}" if self.total is None else f"{self.completed}/{self.total}"
        text = f"{self.description}: {count}{self._unit_text()}, {time.monotonic() - self._started:.1f} s"
        return f"{text}, {self._fields_text()}" if self.fields else text

    def _write_line(self, text: str) -> None:
        assert self._stream is not None
        print(text, file=self._stream, flush=True)
        self._last_line = time.monotonic()
