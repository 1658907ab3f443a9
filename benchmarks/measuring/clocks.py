"""Clocks of the GPU while something runs on it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..environment import query_command, query_gpu

FIELDS = ("clocks.sm", "clocks.mem")
INTERVAL_MS = 500  # between readings


@contextmanager
def watch_clocks(device: str, during: bool) -> Iterator[list[str]]:
    """Yields a list that holds (multiprocessor, memory) clock in MHz afterwards, "" where nothing answers.

    Args:
        device: "cuda" or "cpu".
        during: take the medians of readings while the block runs, which takes it seconds; else one reading behind it,
            which does not disturb short measurements.
    """
    clocks = ["", ""]
    if device != "cuda":
        yield clocks
        return
    lines: list[str] = []
    if during:
        with _readings() as lines:
            yield clocks
    else:
        yield clocks
    clocks[:] = median_clocks(lines or [query_gpu(*FIELDS)])


def median_clocks(lines: list[str]) -> list[str]:
    """Medians of lines "1980, 3201"."""
    pairs = [[part.strip() for part in line.split(",")] for line in lines]
    numbers = [[int(part) for part in pair] for pair in pairs if len(pair) == 2 and all(map(str.isdigit, pair))]
    return [str(sorted(column)[len(column) // 2]) for column in zip(*numbers, strict=True)] or ["", ""]


@contextmanager
def _readings() -> Iterator[list[str]]:
    """Lines of nvidia-smi, read every half second; none where it is not there."""
    lines: list[str] = []
    command = [*query_command(*FIELDS), f"--loop-ms={INTERVAL_MS}"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        except OSError:
            yield lines
            return
        try:
            yield lines
        finally:
            process.kill()
            process.wait()
            output.seek(0)
            lines += output.read().splitlines()
