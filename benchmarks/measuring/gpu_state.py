"""Clocks and power of the GPU while something runs on it, as nvidia-smi says them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median_low

from ..environment import query_command, query_gpu

CLOCKS = ("clocks.sm", "clocks.mem")  # MHz
TIME_AND_STATE = ("timestamp", *CLOCKS, "power.draw.instant")  # local time, W
INTERVAL_MS = 200  # between readings

Span = tuple[float, float]  # of `time.time()`


@dataclass(frozen=True)
class GpuState:
    """Medians of readings, as a row has them; "" where nothing answered."""

    sm_clock_mhz: str = ""
    memory_clock_mhz: str = ""
    power_w: str = ""


@dataclass(frozen=True)
class Reading:
    """One answer of nvidia-smi.

    Attributes:
        time: as `time.time()`.
        values: clock of the multiprocessors and of the memory in MHz, power in W; None where the GPU does not say it.
    """

    time: float
    values: tuple[float | None, ...]


@dataclass
class Watched:
    """What was read while a block ran; filled where the block ends.

    Attributes:
        readings: in the block; none where it was too short to be disturbed, or where the driver is too old to be asked.
        behind: the state right behind it then, without the power, which falls at once.
    """

    readings: list[Reading] = field(default_factory=list)
    behind: GpuState = GpuState()

    def during(self, spans: Sequence[Span]) -> GpuState:
        """The state within `spans`, so that what others did between them does not count."""
        inside = [item.values for item in self.readings if any(begin <= item.time <= end for begin, end in spans)]
        if not inside:
            return GpuState() if self.readings else self.behind
        return _medians(inside)


@contextmanager
def watch_gpu(device: str, readings: bool) -> Iterator[Watched]:
    """Yields what holds the GPU's state behind the block.

    Args:
        device: "cuda" or "cpu".
        readings: read while the block runs, which takes it seconds; else once behind it, which does not disturb short
            measurements.
    """
    watched = Watched()
    with _reading(watched.readings) if readings and device == "cuda" else nullcontext():
        yield watched
    if device == "cuda" and not watched.readings:
        watched.behind = _medians([_numbers(query_gpu(*CLOCKS))])


@contextmanager
def _reading(readings: list[Reading]) -> Iterator[None]:
    """Fills `readings` where the block ends; with nothing where nvidia-smi is not there."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            command = [*query_command(*TIME_AND_STATE), f"--loop-ms={INTERVAL_MS}"]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            process.kill()
            process.wait()
            output.seek(0)
            readings += [reading for line in output if (reading := parse_reading(line)) is not None]


def parse_reading(line: str) -> Reading | None:
    """The reading of a line "2026/11/28 13:45:01.123, 1980, 3201, 687.15"; None for what is no whole line."""
    text, _, values = line.partition(",")
    numbers = _numbers(values)
    if not line.endswith("\n") or len(numbers) != len(TIME_AND_STATE) - 1:
        return None
    try:
        return Reading(datetime.strptime(text.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), numbers)
    except ValueError:
        return None


def _numbers(text: str) -> tuple[float | None, ...]:
    """The numbers of "1980, [N/A]"."""

    def number(part: str) -> float | None:
        try:
            return float(part)
        except ValueError:
            return None

    return tuple(number(part) for part in text.split(","))


def _medians(values: Sequence[tuple[float | None, ...]]) -> GpuState:
    columns = [[value for value in column if value is not None] for column in zip(*values, strict=True)]
    return GpuState(*[f"{median_low(column):.0f}" if column else "" for column in columns])
