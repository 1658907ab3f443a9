"""What the cases of one run share: the device, its measured ceilings, the results folder, and a sign of life."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opensora_fast.costs.hardware import Gpu
from opensora_fast.costs.operations import Count
from opensora_fast.cpu_threads import cpu_threads

from ..environment import describe_environment
from ..processes import RUNNING_FILE
from ..roofline import floor_seconds
from ..rows import Key, Row, append_rows, level_path
from .gpu_state import GpuState
from .refused import Refused, append_refused
from .timing import Times

SECONDS_BETWEEN_BEATS = 1.0


class DeviceLostError(Exception):
    """A provider left the GPU in a state in which nothing else runs; `rows` are those it failed in.

    `rows_before` and `refused` are what the case knew by then.
    """

    def __init__(self, rows: Sequence[Row], reason: str):
        super().__init__(reason)
        self.rows = list(rows)
        self.rows_before: list[Row] = []
        self.refused: list[Refused] = []


class CaseStopped(KeyboardInterrupt):
    """Someone stopped a case; `rows` and `refused` are what it knew by then."""

    def __init__(self, rows: Sequence[Row], refused: Sequence[Refused]):
        super().__init__()
        self.rows, self.refused = list(rows), list(refused)


@contextmanager
def telling(rows: list[Row], refused: list[Refused]) -> Iterator[None]:
    """CaseStopped and DeviceLostError out of the block tell what these lists of a case hold by then."""
    try:
        yield
    except KeyboardInterrupt:
        raise CaseStopped(rows, refused) from None
    except DeviceLostError as lost:
        lost.rows_before, lost.refused = rows, refused
        raise


def threads_of(device: str) -> AbstractContextManager[None]:
    """On the CPU everything is measured with one thread.

    Operations of its small shapes end before a second thread has begun, and on a busy machine waiting for that thread
    made times of the same call differ a hundredfold.
    """
    return cpu_threads(1 if device == "cpu" else None)


class Session:
    """One run of benchmarks on one device.

    Args:
        device: "cuda" or "cpu".
        folder: where rows are appended; None: nothing is written.
        commit: of a copied tree, see `describe_environment`.
        deadline: `time.time()` at which the budget ends; None: no end.
        seconds_factor: on the sampling time of every case.
    """

    def __init__(
        self,
        device: str,
        folder: Path | None = None,
        commit: str | None = None,
        deadline: float | None = None,
        seconds_factor: float = 1.0,
    ):
        self.device = device
        self.folder = folder
        self.environment = describe_environment(device, commit)
        self.deadline = deadline
        self.seconds_factor = seconds_factor
        self.case_name = ""
        self.finished: set[Key] = set()  # rows that nobody needs to measure again
        self.tell: Callable[[str], None] = lambda text: None  # tells a person one line
        self._bandwidth = 0.0
        self._matrix_flops: dict[str, float] = {}
        self._shared: dict[str, Any] = {}
        self._last_beat = 0.0

    # ---- time ----

    @property
    def seconds_left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.time()

    def sampling_seconds(self, planned: float) -> float:
        """Seconds that a case may sample for: what was planned, less near the end of the budget."""
        return max(min(planned * self.seconds_factor, self.seconds_left / 2), 0.0)

    # ---- rows ----

    def record(self, rows: Iterable[Row], refused: Iterable[Refused] = ()) -> None:
        """Writes rows at once, and learns the device's ceilings from them."""
        rows = list(rows)
        self.learn(rows)
        if self.folder is None:
            return
        files: dict[Path, list[Row]] = {}
        for row in rows:
            files.setdefault(level_path(self.folder, row.level), []).append(row)
        for path, of_file in files.items():
            append_rows(path, of_file)
        append_refused(self.folder, refused)

    def learn(self, rows: Iterable[Row]) -> None:
        """Takes the best measured copy bandwidth and matrix rate of each dtype as this device's ceilings."""
        for row in rows:
            if row.status == "ok" and row.level == "copy":
                self._bandwidth = max(self._bandwidth, row.gbytes_per_s * 1e9)
            elif row.status == "ok" and row.level == "gemm":
                self._matrix_flops[row.dtype] = max(self._matrix_flops.get(row.dtype, 0.0), row.tflops_per_s * 1e12)

    def ceilings(self, dtype: str) -> Gpu | None:
        """The measured ceilings for a dtype of matrix products, None before both are known, and on the CPU.

        What is measured on the CPU fits into its caches: a share of the rates of large sizes would say nothing.
        """
        if self.device == "cpu":
            return None
        rate = self._matrix_flops.get(dtype)
        if not rate or not self._bandwidth:
            return None
        return Gpu(self.environment.device_name, rate, self._bandwidth, "measured in this run")

    def complete(
        self,
        row: Row,
        times: Times,
        calls_per_sample: int,
        memory: int,
        count: Count,
        checked: tuple[float, float],
        state: GpuState,
        **others: str,
    ) -> Row:
        """The row with what was measured, and its share of the ceilings known by then.

        Args:
            times: of samples, each of so many calls.
            memory: bytes.
            checked: (error, limit).
            state: of the GPU in the samples.
            others: further columns.
        """
        row = replace(
            row,
            status="ok",
            reason="",
            samples=len(times.milliseconds),
            p20_ms=times.percentile(20) / calls_per_sample,
            p50_ms=times.median / calls_per_sample,
            p80_ms=times.percentile(80) / calls_per_sample,
            memory_bytes=memory,
            flops=count.flops,
            bytes=count.bytes,
            error=checked[0],
            error_limit=checked[1],
            **asdict(state),
            **others,
        )
        self.learn([row])
        return self.with_roofline_share(row)

    def with_roofline_share(self, row: Row) -> Row:
        gpu = self.ceilings(row.dtype)
        return row if gpu is None else replace(row, roofline_share=1e3 * floor_seconds(row, gpu) / row.p50_ms)

    # ---- what cases share ----

    def shared(self, name: str, build: Callable[[], Any]) -> Any:
        """An object that several cases use, built by the first of them."""
        if name not in self._shared:
            self._shared[name] = build()
        return self._shared[name]

    # ---- signs of life ----

    @contextmanager
    def watch(self, rows: Sequence[Row], stage: str) -> Iterator[None]:
        """Says what is running, so that whoever finds the process dead knows whose fault it was.

        Args:
            rows: what has failed if the process dies now; empty where that cannot be told.
        """
        if self.folder is None:
            yield
            return
        self._write_running([row.key for row in rows], stage)
        yield
        # Not in a finally: what was running when an error passed through here is overwritten by what comes next.
        self._write_running([], "between providers")

    def beat(self) -> None:
        """Says that the process is alive."""
        now = time.monotonic()
        if self.folder is not None and now - self._last_beat > SECONDS_BETWEEN_BEATS:
            self._last_beat = now
            path = self.folder / RUNNING_FILE
            if path.exists():
                path.touch()

    def _write_running(self, keys: Sequence[Key], stage: str) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"case": self.case_name, "keys": [list(key) for key in keys], "stage": stage}
        (self.folder / RUNNING_FILE).write_text(json.dumps(state))
        self._last_beat = time.monotonic()
