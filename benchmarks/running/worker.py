"""The process that measures. `supervise` starts it, and starts it again where a provider took it down.

Its standard input has to stay open: it ends with the process that started it, rather than measure on beside the next.

python -m opensora_fast.benchmarks.running.worker '<Plan as JSON>'
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from opensora_fast.terminal import escape_on_stdout

from ..environment import Environment
from ..measuring.case import Case
from ..measuring.refused import format_refused, read_refused
from ..measuring.session import DeviceLostError, Session, threads_of
from ..processes import DONE, ERROR, INTERRUPTED, RESTART, RUNNING_FILE, WRONG, Death, Plan, end_with_parent
from ..report.mixed import compare_mixed
from ..report.results import is_ours
from ..report.summary import format_reasons, format_table
from ..rows import Key, Row, check_folder, read_folder
from ..suites import list_cases
from ..suites.scale import scale_of
from .runner import Report, run_cases


def main() -> None:
    end_with_parent()
    escape_on_stdout()
    plan = Plan.from_json(sys.argv[1])
    try:
        code = run(plan)
    except (ValueError, OSError) as error:  # a mistake of the user, as the command line prints them
        print(f"opensora-fast: error: {error}", file=sys.stderr)
        code = ERROR
    if code != RESTART:  # so it is known that the run is over: a library may end this process, too, with any exit code
        (Path(plan.folder) / RUNNING_FILE).unlink(missing_ok=True)
    sys.exit(code)


def run(plan: Plan) -> int:
    """Measures what the folder lacks; returns an exit code of `processes`."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(plan)
    except KeyboardInterrupt:  # before the first case
        return INTERRUPTED


def _run(plan: Plan) -> int:
    folder = Path(plan.folder)
    cases = list_cases(plan.suite, plan.device, plan.providers, plan.words)
    session = Session(plan.device, folder, plan.commit, plan.deadline)
    check_folder(folder, session.environment)
    kept = kept_rows(plan, read_folder(folder), session.environment)
    kept += record_deaths(plan.deaths, cases, session, kept)
    refused = kept_refusals(plan, read_refused(folder), session.environment)
    report = Report()
    code = DONE
    try:
        with threads_of(plan.device):
            run_cases(cases, session, kept, refused, frozenset(plan.careful), report)
    except DeviceLostError:
        return RESTART
    except KeyboardInterrupt:
        code = DONE if session.seconds_left <= 0 else INTERRUPTED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is measured: nothing to stop
    return print_report(report, cases, plan, session, folder) or code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def kept_rows(plan: Plan, rows: Sequence[Row], own: Environment) -> list[Row]:
    """Those that are not measured again: all, or where the run refreshes those of this run and times of this state."""
    if not plan.refresh:
        return list(rows)
    return [
        row
        for row in rows
        if (found := row.environment)
        and (
            found.date >= plan.started
            or (row.status == "ok" and _is_known(own) and (found.commit, found.dirty) == (own.commit, own.dirty))
        )
    ]


def kept_refusals(plan: Plan, items: Sequence[Mapping[str, Any]], own: Environment) -> frozenset[Key]:
    """Keys of rows that were refused in this run, or before it at this commit; a run that refreshes tries those again.

    What is wrong may lose the device as well: tried again by each process of a run, it would use up the run.
    """
    return frozenset(
        tuple(item["key"])
        for item in items
        if item["date"] >= plan.started
        or (not plan.refresh and _is_known(own) and item["commit"] == own.commit and not item["dirty"])
    )


def _is_known(own: Environment) -> bool:
    """Whether the commit says what the sources are; changed ones may have been others before."""
    return bool(own.commit) and not own.dirty


def record_deaths(
    deaths: Sequence[Death], cases: Sequence[Case], session: Session, kept: Sequence[Row] = ()
) -> list[Row]:
    """Writes and returns failed rows for what took a process down before this one, where no kept row is there."""
    found: dict[Key, Row] = {}
    present = {row.key for row in kept}
    for death in deaths:
        planned = next((case.planned_rows() for case in cases if case.identity == death.case), {})
        for key in map(tuple, death.keys or list(planned)):
            if key in planned and key not in present | found.keys():
                row = dataclasses.replace(planned[key], environment=session.environment)
                found[key] = row.without_time("failed", death.reason)
    session.record(found.values())
    return list(found.values())


def print_report(report: Report, cases: list[Case], plan: Plan, session: Session, folder: Path) -> int:
    """The final table; returns WRONG where this project's own result was wrong, else DONE."""
    planned = {key: row for case in cases for key, row in case.planned_rows().items()}
    # Those of processes before this one belong to the run as well.
    rows = [
        row
        for row in read_folder(folder)
        if row.key in planned and row.environment and row.environment.date >= plan.started
    ]
    refused = {
        key: item
        for item in read_refused(folder)
        if (key := tuple(item["key"])) in planned and item["date"] >= plan.started
    }
    print(format_table(rows))
    reasons = format_reasons(rows)
    if reasons:
        print(f"\n{reasons}")
    scale = scale_of(plan.device)
    for cost in compare_mixed(read_folder(folder), scale.mixed_steps, scale.tokens):
        print(f"mixed shapes: {cost}")
    if report.finished_before:
        print(
            f"\n{report.finished_before} rows were in {folder} already and are kept; --refresh measures those without"
        )
        print("a time again, and those not known to be of these sources")
    if report.left:
        print(f"\nnot reached within the budget: {len(report.left)} cases; run again with the same --out to go on")
    for item in refused.values():
        print(f"wrong, so no time: {format_refused(item)}")
    environment = session.environment
    commit = environment.commit[:12] or "unknown"
    versions = f"torch {environment.torch}, triton {environment.triton}"
    print(f"\n{environment.device_name}, {versions}, commit {commit}{' with changes' if environment.dirty else ''}")
    print(f"rows: {folder}")
    return WRONG if any(is_ours(planned[key]) for key in refused) else DONE


if __name__ == "__main__":
    main()
