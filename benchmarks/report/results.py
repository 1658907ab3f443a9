"""The rows of one folder, as the report asks for them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from opensora_fast.costs.hardware import Gpu, recognize_gpu

from ..measuring.refused import read_refused, without_refused_time
from ..roofline import floor_seconds, project_ms
from ..rows import Key, Row, read_folder
from ..shapes import SIZES

RESOLUTIONS = tuple(SIZES)  # in the order of the page


@dataclass(frozen=True)
class Work:
    """Rows of the same work, one for each provider."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def measured(self) -> list[Row]:
        """The fastest first."""
        return sorted((row for row in self.rows if row.status == "ok"), key=lambda row: row.p50_ms)

    @property
    def ours(self) -> Row | None:
        """The fastest of this project's own, kernels that leave out some included."""
        return next((row for row in self.measured if is_ours(row)), None)

    def of(self, provider: str) -> Row | None:
        """The measured row of a provider."""
        return next((row for row in self.measured if row.provider == provider), None)

    @property
    def reasons(self) -> dict[tuple[str, str], list[str]]:
        """(status, reason) → providers without a time."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.status != "ok":
                found.setdefault((row.status, row.reason), []).append(row.provider)
        return found


@dataclass(frozen=True)
class Published:
    """A figure that Open-Sora published for H800."""

    tokens_per_s: float
    text: str


@dataclass(frozen=True)
class Results:
    """All rows of a folder, which are of one device.

    Attributes:
        refused: what was measured wrong and so has no row, as `read_refused` gives it.
    """

    folder: Path
    rows: tuple[Row, ...]
    refused: tuple[dict, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Reads a results folder.

        Raises:
            ValueError: it is no folder, there is no row in it, or rows of several devices, or a broken file.
        """
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give the folder that holds it")
        rows = read_folder(folder) if folder.is_dir() else []
        if not rows:
            raise ValueError(f"{folder}: holds no benchmark rows; `opensora-fast bench --out {folder}` measures some")
        devices = sorted({row.environment.device_name for row in rows if row.environment})
        if len(devices) > 1:
            raise ValueError(f"{folder}: holds rows of {', '.join(devices)}; a report is about one device")
        return cls(folder, tuple(rows), tuple(read_refused(folder)))

    @cached_property
    def latest(self) -> list[Row]:
        """The last row of each key, with its share of the best ceilings, measured before it or after."""
        ceilings = {dtype: self.ceilings(dtype) for dtype in {row.dtype for row in self._written}}
        return [
            replace(row, roofline_share=1e3 * floor_seconds(row, gpu) / row.p50_ms)
            if row.status == "ok" and (gpu := ceilings[row.dtype])
            else row
            for row in self._written
        ]

    @cached_property
    def _written(self) -> list[Row]:
        """The last row of each key, as it was written; failed where its provider was refused as wrong since."""
        rows = {row.key: row for row in self.rows}
        for item in self.refused:
            row = rows.get(tuple(item["key"]))
            if row is not None and row.environment is not None and row.environment.date < item["date"]:
                rows[row.key] = without_refused_time(row, item)
        return list(rows.values())

    @property
    def device_name(self) -> str:
        return next((row.environment.device_name for row in self.rows if row.environment), "")

    @property
    def device(self) -> str:
        return "cpu" if self.device_name.startswith("cpu") else "cuda"

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def datasheet(self) -> Gpu | None:
        return recognize_gpu(self.device_name)

    def select(self, level: str, op: str | None = None) -> list[Row]:
        """Rows of a level, whatever their status."""
        return [row for row in self.latest if row.level == level and op in (None, row.op)]

    def works(self, level: str, op: str | None = None) -> list[Work]:
        """What was compared at a level, by resolution."""
        return sorted(group(self.select(level, op)), key=lambda work: work_order(work.first))

    def ceilings(self, dtype: str) -> Gpu | None:
        """Best copy bandwidth and matrix rate among the rows; None before both are known, and on the CPU.

        What is measured there fits into its caches, so that floors of the rates of large sizes say nothing.
        """
        if not self.is_gpu:
            return None
        measured = [row for row in self._written if row.status == "ok"]
        bandwidth = max((row.gbytes_per_s for row in measured if row.level == "copy"), default=0.0)
        rate = max((row.tflops_per_s for row in measured if row.level == "gemm" and row.dtype == dtype), default=0.0)
        return Gpu(self.device_name, rate * 1e12, bandwidth * 1e9, "measured") if rate and bandwidth else None

    def limit(self, dtype: str) -> Gpu | None:
        """What floors are counted from: measured ceilings, or else the datasheet."""
        return self.ceilings(dtype) or self.datasheet

    def limit_text(self, dtype: str) -> str:
        """Whose rates floors are counted at, "" where nobody knows any."""
        if self.ceilings(dtype):
            return "the ceilings measured here"
        return f"{self.datasheet.name}'s datasheet" if self.datasheet else ""

    def floor_ms(self, row: Row) -> float:
        """The time that the hardware needs at least; nan where nothing is counted or known."""
        gpu = self.limit(row.dtype)
        return math.nan if gpu is None else 1e3 * floor_seconds(row, gpu)

    def project_step(self, row: Row, target: Gpu) -> tuple[float, float] | None:
        """Projected tokens/s on another GPU, (lowest, highest); None where the split of the time is not known.

        At best only the counted bytes slow down with the bandwidth, at worst all that is not matrix products.
        """
        measured_on, ceilings = self.datasheet, self.ceilings(row.dtype)
        if measured_on is None or ceilings is None or measured_on.name == target.name or not row.flops:
            return None
        least_memory = min(row.bytes / ceilings.bandwidth * 1e3, row.p50_ms)
        most_memory = max(row.p50_ms - row.flops / ceilings.matrix_flops * 1e3, least_memory)
        times = [project_ms(row.p50_ms - memory, memory, measured_on, target) for memory in (most_memory, least_memory)]
        low, high = sorted(row.tokens / time * 1e3 for time in times)
        return low, high


def group(rows: Iterable[Row]) -> list[Work]:
    """Rows of the same work together, in the order in which works first appear."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(row.work, []).append(row)
    return [Work(tuple(rows)) for rows in found.values()]


def work_order(row: Row) -> tuple[int, int, str]:
    resolution, _, frames = row.workload.partition("×")
    index = RESOLUTIONS.index(resolution) if resolution in RESOLUTIONS else len(RESOLUTIONS)
    number = frames.split()[0] if frames else ""
    return index, int(number) if number.isdigit() else 0, row.workload


def is_ours(row: Row) -> bool:
    return row.provider == "ours" or row.provider.startswith("ours-")


def published_for(workload: str) -> list[Published]:
    """Open-Sora's figures for ST-DiT-2 and a workload such as "240p×16"."""
    found = []
    for record in read_published():
        if record["note"] == "" and f"{record['resolution']}×{record['frames']}" == workload:
            found.append(Published(float(record["tokens_per_s_per_gpu"]), f"B={record['batch']}"))
    return found


def read_published() -> list[dict[str, str]]:
    path = files("opensora_fast.benchmarks").joinpath("published/h800.csv")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


# ---- numbers as text ----


def rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s / 1e3:.3g} k" if tokens_per_s < 999.5e3 else f"{tokens_per_s / 1e6:.3g} M"


def time_text(milliseconds: float) -> str:
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.3g} µs"
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1e3:.3g} s"


def error_text(row: Row) -> str:
    return f"error {row.error:.1e} of at most {row.error_limit:.1e}"


def check_share(row: Row) -> float | None:
    """Error over its limit; None where nothing may differ at all."""
    return row.error / row.error_limit if row.error_limit > 0 else None


def timing_text(rows: Iterable[Row]) -> str:
    """What the times of ops and blocks are of."""
    replayed = {row.is_replayed for row in rows if row.status == "ok"}
    kernels, calls = "the kernels of a call alone, replayed as a CUDA graph", "single calls, the host's work included"
    if replayed == {True, False}:
        return f"Times are of {kernels}; those marked as calls are of {calls}."
    return f"Times are of {kernels if True in replayed else calls}."


def gib(row: Row) -> str:
    return f"{row.memory_bytes / 2**30:.3g} GiB" if row.memory_bytes else ""


def joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)
