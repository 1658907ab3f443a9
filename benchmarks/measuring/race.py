"""Times calls that have their own check: copies, matrix products, launches, decoders, bucket assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from opensora_fast.costs.operations import Count

from ..rows import Row
from .case import Outcome
from .contest import describe, release_or_lose
from .gpu_state import watch_gpu
from .refused import Refused
from .session import Session, telling
from .timing import Call, Sampling, SamplingStopped, peak_memory, time_interleaved


@dataclass(frozen=True)
class Check:
    """How wrong the result of a call is, and how wrong it may be."""

    error: float
    limit: float


@dataclass(frozen=True)
class Entry:
    """One row to be measured.

    Attributes:
        prepare: builds inputs and returns (call, check of what the call did last).
        missing: why it cannot run here, "" if it can.
        calls_per_sample: how often `call` does the thing that the row is about.
    """

    provider: str
    version: str
    direction: str
    prepare: Callable[[], tuple[Call, Callable[[], Check]]]
    missing: str = ""
    count: Count = field(default=Count())
    calls_per_sample: int = 1


def run_race(
    template: Row, entries: Sequence[Entry], sampling: Sampling, session: Session, clock: str | None = None
) -> Outcome:
    """Checks and times entries against each other; each costs no more than its own row.

    Args:
        clock: "cpu" for work that the host does, whatever the session's device is; None: the device's.

    Raises:
        DeviceLostError: an entry left the GPU in a state in which nothing else can run; its row is in the error, and
            what is measured.
        CaseStopped: for a KeyboardInterrupt, with what is measured.
    """
    rows: list[Row] = []
    refused: list[Refused] = []
    with telling(rows, refused):
        _race(template, entries, sampling, session, clock or session.device, rows, refused)
    return rows, refused


def _race(
    template: Row,
    entries: Sequence[Entry],
    sampling: Sampling,
    session: Session,
    clock: str,
    rows: list[Row],
    refused: list[Refused],
) -> None:
    """As `run_race`, into `rows` and `refused`."""
    calls: dict[str, Call] = {}
    ready: dict[str, tuple[Row, Entry, Check, int]] = {}

    def give_up(row: Row, reason: str) -> None:
        failed = row.without_time("failed", reason)
        release_or_lose(session.device, [failed], reason)
        rows.append(failed)

    for entry in entries:
        row = replace(
            template,
            provider=entry.provider,
            provider_version=entry.version,
            direction=entry.direction,
            environment=session.environment,
        )
        if entry.missing:
            rows.append(row.without_time("unavailable", entry.missing))
            continue
        reason = ""
        try:
            with session.watch([row], "check"):
                call, check = entry.prepare()
                call()
                memory = peak_memory(call, session.device)
                found = check()
        except Exception as error:  # an entry that crashes costs its own row, whatever it raises
            reason = describe(error)
        if reason:
            give_up(row, reason)
            continue
        if not found.error <= found.limit:
            refused.append(Refused(row, "result", found.error, found.limit))
            continue
        name = f"{entry.provider} {entry.direction}"
        calls[name], ready[name] = call, (row, entry, found, memory)
    if not calls:
        return
    alone = [ready[name][0] for name in calls] if len(calls) == 1 else []
    with session.watch(alone, "samples"), watch_gpu(clock, sampling.watched) as watched:
        stopped = None
        try:
            times = time_interleaved(
                calls, clock, sampling, session.beat, lambda name, error: give_up(ready[name][0], describe(error))
            )
        except SamplingStopped as stop:
            times, stopped = stop.times, stop
    for name, measured in times.items():
        row, entry, found, memory = ready[name]
        checked, state = (found.error, found.limit), watched.during(measured.turns)
        rows.append(session.complete(row, measured, entry.calls_per_sample, memory, entry.count, checked, state))
    if stopped is not None:
        raise stopped


def relative_check(actual: torch.Tensor, exact: torch.Tensor, limit: float) -> Check:
    """‖actual - exact‖ / ‖exact‖ in float64."""
    exact = exact.double()
    error = (actual.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    value = error.item()
    return Check(value if value == value else float("inf"), limit)
