"""What a process and the one that it starts to measure tell each other. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, field

DONE, ERROR, WRONG, RESTART, INTERRUPTED = 0, 1, 3, 75, 130  # exit codes of a worker
RUNNING_FILE = "running.json"  # of the results folder: what is running now; left behind where the process died


@dataclass(frozen=True)
class Death:
    """A worker that did not end by itself.

    Attributes:
        case: identity of the case that was running.
        keys: of the rows that are at fault; empty: all of the case.
        reason: signal or silence.
    """

    case: str
    keys: list[list[str]]
    reason: str


@dataclass(frozen=True)
class Plan:
    """A run of benchmarks.

    Attributes:
        deadline: `time.time()` at which the budget ends, None for none.
        started: date of the run, as in rows.
        careful: identities of cases whose providers are timed one at a time.
    """

    suite: str
    device: str
    folder: str
    started: str
    providers: list[str] | None = None
    words: list[str] = field(default_factory=list)
    commit: str | None = None
    refresh: bool = False
    deadline: float | None = None
    careful: list[str] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        values = json.loads(text)
        values["deaths"] = [Death(**death) for death in values["deaths"]]
        return Plan(**values)


def end_with_parent() -> None:
    """From now on this process ends when its standard input does: the parent has to keep a pipe to it open.

    A parent may be killed without a chance to end what it started.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    sys.stdin.read()
    os._exit(1)
