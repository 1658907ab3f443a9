"""Runs the benchmarks in a process of their own, and goes on where a provider takes that process down.

A kernel that reads out of bounds leaves the GPU unusable for its process; a library may crash or hang. The worker says
what it is doing in a file, which goes when it ends by itself; when it dies, with whatever exit code, or falls silent,
that becomes a failed row and a new worker goes on behind it.
Imports neither torch nor anything that does.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ..processes import INTERRUPTED, RESTART, RUNNING_FILE, Death, Plan

STALL_SECONDS = 180.0  # compiling a block takes a minute or so, in which there is no sign of life
START_SECONDS = 300.0  # until the first one
GRACE_SECONDS = 30.0  # between asking a worker to stop and ending it
MOST_RESTARTS = 100
POLL_SECONDS = 0.1


def supervise(plan: Plan, stall_seconds: float = STALL_SECONDS, command: list[str] | None = None) -> int:
    """Runs workers until one ends by itself; returns its exit code.

    Args:
        plan: what to measure.
        stall_seconds: a worker that gives no sign of life for so long is ended.
        command: starts a worker; the plan is appended.
    """
    command = command or [sys.executable, "-m", "opensora_fast.benchmarks.running.worker"]
    running = Path(plan.folder) / RUNNING_FILE
    before = None
    for _ in range(MOST_RESTARTS):
        running.unlink(missing_ok=True)  # of the worker before, or of a run that was ended from outside
        code, silence, asked = _run_worker([*command, plan.to_json()], plan.deadline, running, stall_seconds)
        if code >= 0 and code != RESTART and not running.exists():
            return code
        if asked or time.time() >= (plan.deadline or float("inf")):
            return INTERRUPTED
        if code == RESTART:
            plan = replace(plan, deaths=[])
            continue
        state = _read_running(running)
        if state is None or (state, plan.careful) == before:
            return code if code > 0 else 128 - code  # it died before it did anything new
        before = state, plan.careful
        reason = silence or _describe_end(code)
        plan = _blame(replace(plan, deaths=[]), state, reason)
    return RESTART


def _blame(plan: Plan, state: dict, reason: str) -> Plan:
    """The plan of the next worker."""
    case, keys = state["case"], state["keys"]
    if not keys and case not in plan.careful:
        return replace(plan, careful=[*plan.careful, case])
    return replace(plan, deaths=[Death(case, keys, f"{reason} ({state['stage']})")])


def _run_worker(
    command: list[str], deadline: float | None, running: Path, stall_seconds: float
) -> tuple[int, str | None, bool]:
    """(exit code, why it was ended for silence or None, whether it was asked to stop)."""
    start = time.time()
    process = _start(command)
    with _forward_signals(process) as asked:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.time()
            if not asked and deadline is not None and now > deadline:
                asked.append(now)
                process.terminate()
            if asked and now - asked[0] > GRACE_SECONDS:
                process.kill()
            last_sign = _modified(running)
            limit = stall_seconds if last_sign else START_SECONDS
            if now - (last_sign or start) > limit:
                process.kill()
                process.wait()
                return process.returncode, f"it gave no sign of life for {limit:g} s", bool(asked)
        return process.returncode, None, bool(asked)


def _start(command: list[str]) -> subprocess.Popen:
    """Ctrl-C reaches the whole process group. The worker ignores it from the first, as what is ignored here meanwhile:
    the supervisor decides, and asks by SIGTERM."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE)  # the worker ends when this pipe does
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen) -> Iterator[list[float]]:
    """Ctrl-C and SIGTERM become one SIGTERM to the worker; the list receives the time of it."""
    asked: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(time.time())
            process.terminate()

    previous: dict[int, Callable | int | None] = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read_running(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"it ended its process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its process was ended by {name}"
