"""Regression gate: two folders of results, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..measuring.refused import read_refused, without_refused_time
from ..rows import Key, Row, read_folder, read_rows

RELATIVE, ABSOLUTE_MS = 0.05, 0.01
RELATIVE_MEMORY, ABSOLUTE_MEMORY = 0.05, 64 * 2**20


@dataclass(frozen=True)
class Thresholds:
    """A row is a regression when it is slower by more than both.

    Attributes:
        relative: share of the earlier time.
        absolute_ms: milliseconds.
    """

    relative: float = RELATIVE
    absolute_ms: float = ABSOLUTE_MS

    def __post_init__(self):
        if not (self.relative >= 0 and self.absolute_ms >= 0):
            raise ValueError(f"thresholds {self.relative} and {self.absolute_ms} ms: each must be a number from 0 on")


@dataclass(frozen=True)
class Difference:
    """What became of a row."""

    before: Row
    after: Row
    kind: str  # "slower", "faster", "more memory", "lost"

    def __str__(self) -> str:
        if self.kind == "lost":
            return f"{self.before.name}: had {self.before.p50_ms:.4g} ms, now {self.after.status}: {self.after.reason}"
        if self.kind == "more memory":
            before, after = (row.memory_bytes / 2**20 for row in (self.before, self.after))
            return f"{self.before.name}: {before:.0f} → {after:.0f} MiB"
        change = self.after.p50_ms / self.before.p50_ms - 1
        return f"{self.before.name}: {self.before.p50_ms:.4g} → {self.after.p50_ms:.4g} ms ({change:+.1%})"


@dataclass(frozen=True)
class Comparison:
    """Differences of all rows that both sides have, and how many only one has.

    Attributes:
        timed_otherwise: rows of replays on one side and of single calls on the other, whose times are not compared.
        other_versions: of what was installed, such as "torch 2.11.0 → 2.13.0": not the sources alone have changed.
    """

    device_names: tuple[str, ...]
    regressions: list[Difference]
    improvements: list[Difference]
    compared: int
    only_before: int
    only_after: int
    timed_otherwise: int
    other_versions: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"regression: {item}" for item in self.regressions]
        lines += [f"faster: {item}" for item in self.improvements]
        lines.append(
            f"{self.compared} rows compared on {', '.join(self.device_names)}: {len(self.regressions)} regressions, "
            f"{len(self.improvements)} faster; {self.only_before} rows only before, {self.only_after} only after"
        )
        if self.timed_otherwise:
            count = self.timed_otherwise
            lines.append(f"times of {count} rows not compared: of replays on one side, of single calls on the other")
        if self.other_versions:
            lines.append(f"not the sources alone differ: {', '.join(self.other_versions)}")
        return "\n".join(lines)


def compare(before: Path, after: Path, thresholds: Thresholds | None = None) -> Comparison:
    """Compares two result folders or CSV files; rows of different devices are never compared.

    A row regressed when it is slower by more than both thresholds, when it takes more memory (by 5 % and by 64 MiB), or
    when its provider fails or was refused as wrong now. A row that one side did not or could not measure is no
    regression.

    Raises:
        ValueError: a path without rows, or no row that both measured on the same device.
    """
    thresholds = thresholds or Thresholds()
    rows_before, rows_after = _read(before), _read(after)
    rows_after |= _refused_rows(after, rows_before, rows_after)
    pairs = [
        (row, rows_after[key])
        for key, row in rows_before.items()
        if row.status == "ok" and key in rows_after and rows_after[key].status != "unavailable"
    ]
    if not pairs:
        raise ValueError(
            f"{before} ({_devices(rows_before)}) and {after} ({_devices(rows_after)}) have no row in common; "
            "rows are compared on the same device only"
        )
    regressions: list[Difference] = []
    improvements: list[Difference] = []
    timed_otherwise = 0
    for old, new in pairs:
        if new.status != "ok":
            regressions.append(Difference(old, new, "lost"))
            continue
        if old.is_replayed != new.is_replayed:
            timed_otherwise += 1
        elif _exceeds(new.p50_ms - old.p50_ms, old.p50_ms, thresholds.relative, thresholds.absolute_ms):
            regressions.append(Difference(old, new, "slower"))
        elif _exceeds(old.p50_ms - new.p50_ms, old.p50_ms, thresholds.relative, thresholds.absolute_ms):
            improvements.append(Difference(old, new, "faster"))
        if _exceeds(new.memory_bytes - old.memory_bytes, old.memory_bytes, RELATIVE_MEMORY, ABSOLUTE_MEMORY):
            regressions.append(Difference(old, new, "more memory"))
    regressions.sort(key=lambda item: -_growth(item))
    return Comparison(
        device_names=tuple(sorted({_device(old) for old, _ in pairs})),
        regressions=regressions,
        improvements=improvements,
        compared=len(pairs),
        only_before=len(rows_before.keys() - rows_after.keys()),
        only_after=len(rows_after.keys() - rows_before.keys()),
        timed_otherwise=timed_otherwise,
        other_versions=_other_versions(pairs),
    )


def _other_versions(pairs: Iterable[tuple[Row, Row]]) -> tuple[str, ...]:
    found = {}
    for old, new in pairs:
        for name in ("driver", "torch", "triton", "python"):
            before, after = getattr(old.environment, name, ""), getattr(new.environment, name, "")
            if before != after:
                found[f"{name} {before or 'none'} → {after or 'none'}"] = None
    return tuple(found)


def _exceeds(growth: float, base: float, relative: float, absolute: float) -> bool:
    return growth > relative * base and growth > absolute


def _growth(item: Difference) -> float:
    return item.after.p50_ms / item.before.p50_ms if item.kind == "slower" else float("inf")


def _read(path: Path) -> dict[Key, Row]:
    """(device, key of the row) → the last row of it."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such folder or file")
    rows = read_folder(path) if path.is_dir() else read_rows(path)
    if not rows:
        raise ValueError(f"{path}: holds no benchmark rows")
    return {(_device(row), *row.key): row for row in rows}


def _refused_rows(folder: Path, before: dict[Key, Row], after: dict[Key, Row]) -> dict[Key, Row]:
    """Those of `before` that were refused as wrong since they last had a row in the folder, as failed rows."""
    found: dict[Key, Row] = {}
    for item in read_refused(folder):
        key = (item["device_name"], *item["key"])
        if key in before and (key not in after or _date(after[key]) < item["date"]):
            found[key] = without_refused_time(before[key], item)
    return found


def _date(row: Row) -> str:
    return row.environment.date if row.environment else ""


def _device(row: Row) -> str:
    return row.environment.device_name if row.environment else ""


def _devices(rows: dict[Key, Row]) -> str:
    return ", ".join(sorted({_device(row) for row in rows.values()}))
