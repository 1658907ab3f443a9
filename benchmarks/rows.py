"""A number is a row: what was measured, by whom, how right it was, and where.

Rows are CSV files under `benchmarks/results/<device>/`. A provider whose error is over its limit gets no time: its row
is refused here and reported by the caller. A provider that cannot run gets a row that says why.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from opensora_fast.files import naming_file

from .environment import Environment

# Level → the file that holds its rows.
FILES = {
    "copy": "ceilings.csv",
    "gemm": "ceilings.csv",
    "launch": "ceilings.csv",
    "op": "op.csv",
    "block": "block.csv",
    "step": "step.csv",
    "sampling": "sampling.csv",
    "loader": "data.csv",
    "buckets": "data.csv",
    "convergence": "convergence.csv",
}
LEVELS = tuple(FILES)
Key = tuple[str, ...]

# What `Row.timed` begins with where samples were to be of replays.
REPLAYED, CALLED = "graph", "calls"
LATER_COLUMNS = ("timed", "power_w")  # files written before have none; it is empty then


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none.

    Attributes:
        level: one of LEVELS.
        workload: name of the shape, for example "240p×16".
        op: name of the op, "" where the level says it.
        direction: "forward", "forward+backward", "backward of input", "backward of weight" (matrix products),
            "training" (forward, backward, optimizer and average of the weights), "update" (the latter two alone),
            "against seeds" or "against rounding" (two limits of one comparison of loss curves).
        provider: implementation, for example "sdpa-flash", "ours".
        provider_version: version of its library.
        shape: sizes as text, for example "B=4 T=16 S=405 H=16 D=72".
        tokens: tokens processed, 0 where it means nothing.
        dtype: of the inputs.
        status: "ok", "unavailable" or "failed".
        reason: why there is no time.
        samples: how many times were taken.
        p20_ms, p50_ms, p80_ms: percentiles of the time in milliseconds; p50 is the median.
        memory_bytes: peak of allocated GPU memory during the call, beyond what was allocated before it; at the levels
            "step" and "sampling" all of it, weights and optimizer included.
        flops: useful floating-point operations; bytes: least bytes to move.
        roofline_share: floor time / p50 at the best ceilings known by then, also by rows that the folder had of earlier
            runs; nan where none were known.
        error: relative error against float64, at the level "convergence" relative distance of loss curves;
            error_limit: what it may be.
        checked_on: the inputs of that comparison, where the timed ones are too large for float64. The timed ones are
            then compared with eager's results, unless "alone: " and a reason stand behind it.
        sm_clock_mhz, memory_clock_mhz: of the GPU, medians of readings in this row's samples where these are long, else
            one reading right after them. (Files without `power_w`: in the samples of all providers of the case.)
        power_w: its power in the former, "" in the latter, as it falls at once.
        timed: "graph": replays of a CUDA graph of the call, so its kernels alone; "calls: " and why there is no such
            graph, or "" where none was to be: single calls, in which the GPU may wait for the host.
    """

    level: str
    workload: str
    op: str
    direction: str
    provider: str
    provider_version: str
    shape: str
    tokens: int
    dtype: str
    status: str
    reason: str = ""
    samples: int = 0
    p20_ms: float = math.nan
    p50_ms: float = math.nan
    p80_ms: float = math.nan
    memory_bytes: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    roofline_share: float = math.nan
    error: float = math.nan
    error_limit: float = math.nan
    checked_on: str = ""
    sm_clock_mhz: str = ""
    memory_clock_mhz: str = ""
    power_w: str = ""
    timed: str = ""
    environment: Environment | None = field(default=None)

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"row {self.name}: level {self.level!r}; use one of {', '.join(LEVELS)}")
        if self.status not in ("ok", "unavailable", "failed"):
            raise ValueError(f"row {self.name}: status {self.status!r}; use ok, unavailable or failed")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"row {self.name}: a row without a time must give its reason")
        if self.status == "ok" and not 0 < self.p50_ms < math.inf:
            raise ValueError(f"row {self.name}: p50_ms {self.p50_ms}; a row with a time must have one")
        if self.status == "ok" and not self.error <= self.error_limit:
            raise ValueError(
                f"row {self.name}: error {self.error:.3g} is over its limit {self.error_limit:.3g}; "
                "a wrong result gets no time"
            )

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.level, self.op, self.direction, self.workload, self.provider) if part)

    @property
    def key(self) -> Key:
        """What makes two rows measurements of the same thing."""
        return (self.level, self.workload, self.op, self.direction, self.provider, self.shape, self.dtype)

    @property
    def work(self) -> Key:
        """What rows of different providers have in common that are compared."""
        return (self.level, self.op, self.direction, self.workload, self.shape, self.dtype)

    def without_time(self, status: str, reason: str) -> Row:
        """The row of a provider that gave none; the reason, which may be a library's, becomes one line."""
        return replace(self, status=status, reason=" ".join(reason.split()) or "no reason given")

    @property
    def is_replayed(self) -> bool:
        return self.timed == REPLAYED

    @property
    def tflops_per_s(self) -> float:
        return self.flops / self.p50_ms / 1e9

    @property
    def gbytes_per_s(self) -> float:
        return self.bytes / self.p50_ms / 1e6

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.p50_ms * 1e3


_MEASURED = [item.name for item in fields(Row) if item.name != "environment"]
_DERIVED = ["tflops_per_s", "gbytes_per_s", "tokens_per_s"]
_ENVIRONMENT = [item.name for item in fields(Environment)]
COLUMNS = _MEASURED + _DERIVED + _ENVIRONMENT


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file, with a header when it is new; what is left of a row that was cut off goes.

    Raises:
        ValueError: the file holds other columns, or rows of another device.
        OSError: not all was written: the disk is full, for example; the file is named.
    """
    rows = list(rows)
    if path.exists():
        _remove_cut_off_row(path)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_columns(path)
        devices = {row.environment.device_name for row in read_rows(path) if row.environment}
        strangers = {row.environment.device_name for row in rows if row.environment} - devices
        if devices and strangers:
            raise ValueError(f"{path}: holds rows of {', '.join(devices)}; rows of {', '.join(strangers)} go elsewhere")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    if new:
        writer.writeheader()
    writer.writerows(_to_record(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.getvalue().encode()
    with naming_file(path), path.open("ab", buffering=0) as file:
        # One write, so that whoever stops the process leaves no half row; the next says what cut that one short.
        while content:
            content = content[file.write(content) :]


def read_rows(path: Path) -> list[Row]:
    """Reads rows written by `append_rows`, without a last one that was cut off: by a full disk, for example.

    Raises:
        ValueError: a missing column or a value that does not parse, by file and line.
    """
    rows = []
    text = path.read_bytes()[: _find_whole_end(path)].decode()
    for line, record in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
        try:
            if None in record.values():
                raise ValueError("it has fewer cells than the header")
            rows.append(_from_record(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{line}: not a benchmark row: {error}") from error
    return rows


def _find_whole_end(path: Path) -> int:
    """Bytes of a file up to the end of its last whole row; a line without an end is whole if its last cell is, a date.

    A file that is not of this version counts as whole.
    """
    content = path.read_bytes()
    first, _, _ = content.partition(b"\n")
    header = ",".join(COLUMNS).encode()
    if first.rstrip(b"\r") != header:
        return 0 if header.startswith(content) else len(content)
    end = content.rfind(b"\n") + 1
    last = next(csv.reader([content[end:].decode(errors="replace")]), [])
    is_cut_off = bool(last) and (len(last) < len(COLUMNS) or not last[-1].endswith("Z"))
    return end if is_cut_off else len(content)


def _remove_cut_off_row(path: Path) -> None:
    end = _find_whole_end(path)
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(max(0, end - 1))
        if end and file.read(1) != b"\n":
            file.write(b"\r\n")


def read_folder(folder: Path) -> list[Row]:
    """All rows of a folder of results; [] where there is none yet.

    Raises:
        ValueError: a file of another version, or one that is broken.
    """
    paths = (folder / name for name in dict.fromkeys(FILES.values()))
    return [row for path in paths if path.exists() for row in read_rows(path)]


def check_folder(folder: Path, environment: Environment) -> None:
    """Raises ValueError where rows of the environment cannot be added to a folder.

    That is where it holds rows of another device, or a file of another version, which could be read all the same.
    """
    name = environment.device_name
    others = sorted({row.environment.device_name for row in read_folder(folder) if row.environment} - {name})
    if others:
        raise ValueError(f"{folder} holds rows of {', '.join(others)}; rows of {name} go into another folder")
    for path in (folder / file for file in dict.fromkeys(FILES.values())):
        if path.exists() and _find_whole_end(path) > 0:
            _check_columns(path)


def _check_columns(path: Path) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != COLUMNS:
        raise ValueError(f"{path}: its columns are not those of this version; write into another folder")


def level_path(folder: Path, level: str) -> Path:
    """The file of a level's rows."""
    return folder / FILES[level]


def _to_record(row: Row) -> dict[str, object]:
    record = {name: getattr(row, name) for name in _MEASURED}
    if row.status == "ok":
        record |= {name: getattr(row, name) for name in _DERIVED}
    if row.environment is not None:
        record |= asdict(row.environment)
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _from_record(record: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for item in fields(Row):
        if item.name == "environment":
            continue
        text = record.get(item.name, "") if item.name in LATER_COLUMNS else record[item.name]
        if item.type == "int":
            values[item.name] = int(text or 0)
        elif item.type == "float":
            values[item.name] = float(text) if text else math.nan
        else:
            values[item.name] = text
    environment = {name: record[name] for name in _ENVIRONMENT}
    environment["dirty"] = environment["dirty"] == "True"
    return Row(**values, environment=Environment(**environment))
