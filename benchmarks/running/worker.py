"""The process that measures. `supervise` starts it, and starts it again where a provider took it down.

Its standard input has to stay open: it ends with the process that started it, rather than measure on beside the next.

python -m opensora_fast.benchmarks.running.worker '<Plan as JSON>'
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..measuring.case import Case
from ..measuring.session import DeviceLostError, Session, threads_of
from ..processes import DONE, ERROR, INTERRUPTED, RESTART, RUNNING_FILE, WRONG, Death, Plan, end_with_parent
from ..refused import read_refused
from ..report.mixed import compare_mixed
from ..report.summary import format_reasons, format_table
from ..rows import check_folder, read_folder
from ..suites import list_cases
from ..suites.scale import scale_of
from .runner import Report, run_cases


def main() -> None:
    end_with_parent()
    try:
        code = run(Plan.from_json(sys.argv[1]))
    except (ValueError, OSError) as error:  # a mistake of the user, as the command line prints them
        print(f"opensora-fast: error: {error}", file=sys.stderr)
        code = ERROR
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
    record_deaths(plan.deaths, cases, session)
    existing = read_folder(folder)
    refused_before = read_refused_keys(folder, session)
    report = Report()
    code = DONE
    try:
        with threads_of(plan.device):
            run_cases(cases, session, existing, refused_before, plan.refresh, frozenset(plan.careful), report)
    except DeviceLostError:
        return RESTART
    except KeyboardInterrupt:
        code = DONE if session.seconds_left <= 0 else INTERRUPTED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is measured: nothing to stop
    (folder / RUNNING_FILE).unlink(missing_ok=True)
    return print_report(report, cases, plan, session, folder) or code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def record_deaths(deaths: Sequence[Death], cases: Sequence[Case], session: Session) -> None:
    """Writes failed rows for what took a process down before this one."""
    assert session.folder is not None
    present = {row.key for row in read_folder(session.folder)}
    for death in deaths:
        planned = next((case.planned_rows() for case in cases if case.identity == death.case), {})
        for key in map(tuple, death.keys or list(planned)):
            if key in planned and key not in present:
                row = dataclasses.replace(planned[key], environment=session.environment)
                session.record([row.without_time("failed", death.reason)])
                present.add(key)


def read_refused_keys(folder: Path, session: Session) -> frozenset[tuple[str, ...]]:
    """Keys of rows that were refused at this commit; none where the sources differ from it."""
    own = session.environment
    if own.dirty or not own.commit:
        return frozenset()
    items = read_refused(folder)
    return frozenset(tuple(item["key"]) for item in items if item["commit"] == own.commit and not item["dirty"])


def print_report(report: Report, cases: list[Case], plan: Plan, session: Session, folder: Path) -> int:
    """The final table; returns WRONG where this project's own result was wrong, else DONE."""
    planned = {key for case in cases for key in case.planned_rows()}
    rows = [
        row
        for row in read_folder(folder)  # those of processes before this one belong to the run as well
        if row.key in planned and row.environment and row.environment.date >= plan.started
    ]
    print(format_table(rows))
    reasons = format_reasons(rows)
    if reasons:
        print(f"\n{reasons}")
    scale = scale_of(plan.device)
    for cost in compare_mixed(read_folder(folder), scale.mixed_steps, scale.tokens):
        print(f"mixed shapes: {cost}")
    if report.finished_before:
        print(f"\n{report.finished_before} rows were in {folder} already and are kept; --refresh measures those of")
        print("another state of the sources again")
    if report.left:
        print(f"\nnot reached within the budget: {len(report.left)} cases; run again with the same --out to go on")
    for item in report.refused:
        print(f"wrong, so no time: {item}")
    environment = session.environment
    commit = environment.commit[:12] or "unknown"
    versions = f"torch {environment.torch}, triton {environment.triton}"
    print(f"\n{environment.device_name}, {versions}, commit {commit}{' with changes' if environment.dirty else ''}")
    print(f"rows: {folder}")
    return WRONG if any(item.row.provider.startswith("ours") for item in report.refused) else DONE


if __name__ == "__main__":
    main()
