"""A real worker process over toy cases: `supervise` starts it as it starts the real one.

python toy_worker.py CASES '<Plan as JSON>'
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench_toys import ToyWork, multiply, toy_case, toy_contest

from opensora_fast.benchmarks.measuring.case import Case, Outcome
from opensora_fast.benchmarks.measuring.contest import DeviceLostError, run_contest
from opensora_fast.benchmarks.measuring.provider import Provider, of_function
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.measuring.timing import Sampling
from opensora_fast.benchmarks.running import worker


def kill(work: ToyWork):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(work: ToyWork):
    os._exit(0)  # as after a job that is done


EVIL = (
    Provider("kill", of_function(kill)),
    Provider("leave", of_function(leave)),
    Provider("kill-by-import", of_function(multiply), missing=kill),
)
WRONG = (Provider("ours", of_function(lambda work: multiply(work) + 1)),)


def case_with(others: Sequence[Provider], size: int, value: float) -> Case:
    """A case of eager, another good provider, and these."""
    good = ("eager", "other")

    def measure(session: Session, chosen: Sequence[str]) -> Outcome:
        contest = toy_contest([name for name in chosen if name in good] or ["absent"], size)
        providers = [provider for provider in contest.providers if provider.name != "absent"]
        providers += [provider for provider in others if provider.name in chosen]
        return run_contest(replace(contest, providers=providers), session)

    names = (*good, *(provider.name for provider in others))
    return replace(toy_case(["eager"], size), providers=names, measure=measure, value=value)


def lost_case() -> Case:
    """A case whose provider loses the device."""
    plain = toy_case(["eager", "crash"], 32)

    def measure(session: Session, chosen: Sequence[str]) -> Outcome:
        if "crash" in chosen:
            rows = [row for row in plain.planned_rows().values() if row.provider == "crash"]
            rows = [replace(row, environment=session.environment) for row in rows]
            raise DeviceLostError([row.without_time("failed", "CUDA error") for row in rows], "CUDA error")
        return run_contest(toy_contest(chosen, 32), session)

    return replace(plain, measure=measure, value=3.0)


def slow_case(index: int) -> Case:
    def measure(session: Session, chosen: Sequence[str]) -> Outcome:
        contest = replace(toy_contest(chosen, 100 + index), sampling=Sampling(0.3, min_samples=10**9))
        return run_contest(contest, session)

    return replace(toy_case(["eager"], size=100 + index, value=1.0 - index / 100), measure=measure)


def long_case() -> Case:
    """Samples for ten minutes, if it may."""

    def measure(session: Session, chosen: Sequence[str]) -> Outcome:
        return run_contest(replace(toy_contest(chosen), sampling=Sampling(600.0, min_samples=10**9)), session)

    return replace(toy_case(["absent", "eager", "other"]), measure=measure)


CASES = {
    "evil": lambda: [lost_case(), case_with(EVIL, 48, 2.0), case_with(WRONG, 64, 1.0), toy_case(["eager"], 80, 0.5)],
    "long": lambda: [long_case()],
    "slow": lambda: [slow_case(index) for index in range(100)],
}

if __name__ == "__main__":
    kind = sys.argv.pop(1)
    worker.list_cases = lambda *arguments: CASES[kind]()
    worker.main()
