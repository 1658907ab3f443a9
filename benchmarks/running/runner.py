"""Measures cases one after another, the most valuable first, and writes their rows as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from opensora_fast.progress import Progress

from ..measuring.case import Case
from ..measuring.contest import describe
from ..measuring.provider import forget_compiled
from ..measuring.refused import Refused
from ..measuring.session import CaseStopped, DeviceLostError, Session
from ..measuring.timing import release_memory
from ..rows import Key, Row

SHORTEST_CASE_S = 2.0  # no case is begun with less of the budget left, nor with less than its estimate


@dataclass
class Report:
    """What a run did.

    Attributes:
        rows: measured now.
        refused: providers that computed something wrong.
        finished_before: rows that the folder had already.
        left: cases that the budget did not reach.
    """

    rows: list[Row] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    finished_before: int = 0
    left: list[Case] = field(default_factory=list)


def run_cases(
    cases: Iterable[Case],
    session: Session,
    existing: Sequence[Row] = (),
    refused_before: frozenset[Key] = frozenset(),
    careful: frozenset[str] = frozenset(),
    report: Report | None = None,
) -> Report:
    """Measures what is not among the existing rows.

    Args:
        existing: whatever their status, they are not measured again.
        refused_before: keys of rows that were refused; not measured again either.
        careful: identities of cases that once took the whole process down: each provider is then timed alone, so that
            it is known which.
        report: filled while the run goes on, for whoever interrupts it.

    Raises:
        DeviceLostError: nothing more can be measured in this process; what is known is written, the rows of the
            provider at fault too.
    """
    report = report or Report()
    session.learn(existing)
    finished = {row.key for row in existing} | refused_before
    session.finished = finished
    ordered = sorted(cases, key=lambda case: -case.value)
    report.finished_before = sum(key in finished for case in ordered for key in case.planned_rows())
    waiting = [case for case in ordered if case.unfinished(finished)]
    with Progress("benchmark", total=len(waiting), unit="cases") as progress:
        session.tell = progress.note
        for case in waiting:
            if session.seconds_left < max(SHORTEST_CASE_S, case.seconds):
                report.left.append(case)
                continue
            session.case_name = case.identity
            names = case.unfinished(finished)
            for group in [[name] for name in names] if case.identity in careful else [names]:
                _measure(case, session, group, report)
            progress.advance(1, case=case.name)
    return report


def _measure(case: Case, session: Session, names: Sequence[str], report: Report) -> None:
    """Measures these providers; whatever is known of them is written and reported, however it ends."""

    def keep(rows: Sequence[Row], refused: Sequence[Refused]) -> None:
        rows = [row for row in rows if row.key not in session.finished]
        session.record(rows, refused)
        report.rows += rows
        report.refused += refused
        for item in refused:
            session.tell(f"refused: {item}")

    forget_compiled()
    # Of the case, too, before its first provider is called: imports and inputs may take the process down as well.
    alone = [row for row in case.planned_rows().values() if row.provider in names] if len(names) == 1 else []
    try:
        with session.watch(alone, "preparation"):
            outcome = case.measure(session, names)
    except DeviceLostError as lost:
        keep([*lost.rows_before, *lost.rows], lost.refused)
        raise
    except CaseStopped as stop:
        keep(stop.rows, stop.refused)
        raise
    except Exception as error:  # what all its providers share failed, the float64 reference for example
        outcome = failed_rows(case, session, names, describe(error)), []
    keep(*outcome)
    try:
        release_memory(session.device)
    except RuntimeError as error:  # nothing runs on the GPU any more, and nobody knows by whose fault
        raise DeviceLostError([], describe(error)) from error


def failed_rows(case: Case, session: Session, names: Sequence[str], reason: str) -> list[Row]:
    """A failed row for every planned one of these providers."""
    return [
        replace(row, environment=session.environment).without_time("failed", reason)
        for row in case.planned_rows().values()
        if row.provider in names
    ]
