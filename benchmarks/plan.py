"""What a supervisor tells a worker, and what a worker's exit code tells its supervisor. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field

DONE, ERROR, WRONG, RESTART, INTERRUPTED = 0, 1, 3, 75, 130


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


def parse_budget(text: str) -> float:
    """Seconds of "9m", "90s", "1h" or "540".

    Raises:
        ValueError: anything else, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(f"--budget {text!r}: write a time such as 9m, 90s or 1h")
    return seconds
