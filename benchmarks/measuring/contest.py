"""Providers of the same work, checked against float64, then timed against each other.

A provider costs no more than its own rows: where it cannot run, crashes or runs out of memory, its rows say so. Where
its outputs are wrong it gets none, where its gradients are, none but that of the forward pass; each that it does not
get is reported as `Refused`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora_fast.costs.operations import Count

from ..rows import CALLED, REPLAYED, Row
from .accuracy import OUTPUT, Judgement, Named, Yardstick, norm, weights_like
from .case import Outcome
from .gpu_state import watch_gpu
from .provider import Bound, Outputs, Provider
from .refused import Refused
from .replay import CallRecorder, make_replay, own_stream
from .session import DeviceLostError, Session, telling
from .timing import Call, Sampling, SamplingStopped, peak_memory, release_memory, time_interleaved

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
ALONE = "alone: eager runs out of memory on the timed inputs"  # where a row tells what was checked


@dataclass(frozen=True)
class Contest:
    """What is to be computed, by whom, and how it is checked and timed.

    Attributes:
        template: the row without provider, direction and numbers.
        work: the inputs that are timed.
        providers: who takes part.
        references: eager PyTorch. The first is exact in float64; the largest error of all of them in the dtype of the
            work sets the limits.
        calls: direction → what is timed, made from a provider's bound call and the work.
        counts: direction → operations and bytes.
        results: results by name of a bound call, the outputs' names beginning with "output".
        check_work: smaller inputs of the same kind for the comparison with float64; None: the timed ones. The timed
            ones are then compared with eager's results.
        check_name: of `check_work`, for the row.
        smaller: makes (check_work, check_name) where float64 of the timed inputs does not fit into the GPU's memory.
        sampling: how samples are taken.
        total_memory: report all allocated memory, not what a call adds.
        calls_per_sample: how often a call does the thing that the row is about.
        make_recorder: samples are of replays of what it records, where it can; None: of the calls themselves.
    """

    template: Row
    work: Any
    providers: Sequence[Provider]
    references: Sequence[Provider]
    calls: Mapping[str, Callable[[Bound, Any], Call]]
    counts: Mapping[str, Count]
    sampling: Sampling
    results: Callable[[Bound, Any], tuple[Named, float]] = field(default=lambda bound, work: op_results(bound, work))
    check_work: Any | None = None
    check_name: str = ""
    smaller: Callable[[], tuple[Any, str]] | None = None
    total_memory: bool = False
    calls_per_sample: int = 1
    make_recorder: Callable[[], CallRecorder] | None = None


@dataclass(frozen=True)
class _Ready:
    """A provider's call of one direction, warmed up; `timed` as in the row."""

    call: Call
    memory: int
    timed: str


def run_contest(contest: Contest, session: Session) -> Outcome:
    """Checks and times all providers.

    Raises:
        DeviceLostError: a provider left the GPU in a state in which nothing else can run; its row is in the error, and
            what is measured.
        CaseStopped: for a KeyboardInterrupt, with what is measured.
    """
    run = _Run(contest, session)
    stream = nullcontext() if contest.make_recorder is None else own_stream(contest.work.device)
    with telling(run.rows, run.refused), stream:
        return run.measure()


class _Run:
    def __init__(self, contest: Contest, session: Session):
        self.contest = contest
        self.session = session
        self.rows: list[Row] = []
        self.refused: list[Refused] = []

    def measure(self) -> Outcome:
        able = [provider for provider in self.contest.providers if self._is_present(provider)]
        if not able:
            return self.rows, self.refused
        judgements = self._check(able)
        for direction, make_call in self.contest.calls.items():
            right = [
                provider
                for provider in able
                if provider.name in judgements and judgements[provider.name][direction == FORWARD].is_right
            ]
            self._measure_direction(direction, make_call, right, judgements)
            if self.contest.make_recorder is not None:
                release_memory(self.contest.work.device)  # that of the replays
        return self.rows, self.refused

    def _measure_direction(
        self,
        direction: str,
        make_call: Callable[[Bound, Any], Call],
        providers: Sequence[Provider],
        judgements: Mapping[str, Mapping[bool, Judgement]],
    ) -> None:
        ready: dict[str, _Ready] = {}
        record = self.contest.make_recorder() if self.contest.make_recorder is not None else None
        for provider in providers:
            row = self._row(provider, direction)
            if row.key in self.session.finished:
                continue
            with self.session.watch([row], "first calls"):
                found = self._try(provider, partial(self._first_calls, provider, make_call, record), direction)
            if found is not None:
                ready[provider.name] = found
        self._time(direction, ready, judgements, {provider.name: provider for provider in providers})

    # ---- whether a provider is right ----

    def _is_present(self, provider: Provider) -> bool:
        reason = self._try(provider, partial(provider.missing, self.contest.work), None)
        for direction in self.contest.calls if reason else ():
            self.rows.append(self._row(provider, direction).without_time("unavailable", reason))
        return reason == ""  # None: it could not say, and has its failed rows

    def _check(self, providers: Sequence[Provider]) -> dict[str, dict[bool, Judgement]]:
        """Provider → its judgement by outputs alone (True) and with gradients (False); none of those that fail."""
        with self.session.watch([], "the float64 reference"):
            yardstick = self._make_yardstick()
            contest = self.contest
        release_memory(contest.work.device)
        check_work = contest.work if contest.check_work is None else contest.check_work
        judged = self._judge_each(providers, "check", check_work, yardstick.judge)
        if contest.check_work is not None:
            yardstick = replace(yardstick, exact={})  # whose memory the timed inputs may need
            self._check_timed_inputs(providers, yardstick, judged)
        return judged

    def _check_timed_inputs(
        self, providers: Sequence[Provider], yardstick: Yardstick, judged: dict[str, dict[bool, Judgement]]
    ) -> None:
        """Compares those whose outputs are right with eager's results of the timed inputs, and corrects `judged`."""
        contest = self.contest
        with self.session.watch([], "eager on the timed inputs"):
            full = self._eager_on_timed_inputs()
        release_memory(contest.work.device)
        if full is None:
            self.contest = replace(contest, check_name=f"{contest.check_name} {ALONE}")
            return

        def judge(results: Named, outputs_only: bool) -> Judgement:
            found = yardstick.judge_against_eager(results, *full, outputs_only)
            return replace(found, name=f"{found.name} of the timed inputs")

        right = [item for item in providers if item.name in judged and judged[item.name][True].is_right]
        on_timed = self._judge_each(right, "check of the timed inputs", contest.work, judge)
        for provider in right:
            before = judged.pop(provider.name)
            if provider.name in on_timed:
                found = on_timed[provider.name].items()
                judged[provider.name] = {key: before[key] if item.is_right else item for key, item in found}

    def _make_yardstick(self) -> Yardstick:
        """From the inputs of the check; from smaller ones where float64 of the timed inputs does not fit."""
        contest = self.contest
        if contest.check_work is None and contest.smaller is not None:
            try:
                return make_yardstick(contest.references, contest.work, contest.results)
            except torch.OutOfMemoryError:
                pass  # not handled here: the traceback would hold the memory
            release_memory(contest.work.device)
            check_work, check_name = contest.smaller()
            self.contest = contest = replace(contest, check_work=check_work, check_name=check_name)
        check_work = contest.work if contest.check_work is None else contest.check_work
        return make_yardstick(contest.references, check_work, contest.results)

    def _eager_on_timed_inputs(self) -> tuple[Named, float] | None:
        """(eager's results, norm sent back); None where it runs out of memory."""
        contest = self.contest
        try:
            return contest.results(contest.references[0].prepare(contest.work), contest.work)
        except torch.OutOfMemoryError:  # the smaller inputs have to do, and rows say so
            return None

    def _judge_each(
        self, providers: Sequence[Provider], stage: str, work: Any, judge: Callable[[Named, bool], Judgement]
    ) -> dict[str, dict[bool, Judgement]]:
        """Provider → judgements as in `_check` of its results on `work`; who is wrong is refused at once."""
        judged = {}
        for provider in providers:
            with self.session.watch([self._row(provider, direction) for direction in self.contest.calls], stage):
                found = self._try(provider, partial(self._judge, provider, work, judge), None)
            if found is not None:
                judged[provider.name] = found
                self._refuse(provider, found)
            if self.contest.sampling.large:
                release_memory(work.device)
        return judged

    def _judge(self, provider: Provider, work: Any, judge: Callable[[Named, bool], Judgement]) -> dict[bool, Judgement]:
        results, _ = self.contest.results(provider.prepare(work), work)
        return {outputs_only: judge(results, outputs_only) for outputs_only in (True, False)}

    def _refuse(self, provider: Provider, judgements: Mapping[bool, Judgement]) -> None:
        """Notes the rows that a wrong provider does not get, each once."""
        known = {item.row.key for item in self.refused}
        for direction in self.contest.calls:
            row, found = self._row(provider, direction), judgements[direction == FORWARD]
            if not found.is_right and row.key not in known:
                self.refused.append(Refused(row, found.name, found.error, found.limit, found.parts))

    # ---- how fast it is ----

    def _first_calls(
        self, provider: Provider, make_call: Callable[[Bound, Any], Call], record: CallRecorder | None
    ) -> _Ready:
        contest = self.contest
        call = make_call(provider.prepare(contest.work), contest.work)
        call()
        memory = peak_memory(call, contest.work.device, contest.total_memory)
        if contest.sampling.large:
            release_memory(contest.work.device)
        if record is None:
            return _Ready(call, memory, "")
        try:
            return _Ready(make_replay(call, record), memory, REPLAYED)
        except Exception as error:  # it waits for the GPU, or a library refuses: no reason to have no time
            reason = describe(error)
        release_memory(contest.work.device)
        return _Ready(call, memory, f"{CALLED}: {reason}")

    def _time(
        self,
        direction: str,
        ready: Mapping[str, _Ready],
        judgements: Mapping[str, Mapping[bool, Judgement]],
        providers: Mapping[str, Provider],
    ) -> None:
        if not ready:
            return
        contest, device = self.contest, self.contest.work.device
        alone = [self._row(providers[name], direction) for name in ready] if len(ready) == 1 else []
        with self.session.watch(alone, "samples"), watch_gpu(device, contest.sampling.watched) as watched:
            stopped = None
            try:
                times = time_interleaved(
                    {name: item.call for name, item in ready.items()},
                    device,
                    contest.sampling,
                    self.session.beat,
                    lambda name, error: self._give_up([self._row(providers[name], direction)], describe(error)),
                )
            except SamplingStopped as stop:
                times, stopped = stop.times, stop
        for name, measured in times.items():
            judgement = judgements[name][direction == FORWARD]
            row = self.session.complete(
                self._row(providers[name], direction),
                measured,
                contest.calls_per_sample,
                ready[name].memory,
                contest.counts.get(direction, Count()),
                (judgement.error, judgement.limit),
                watched.during(measured.turns),
                checked_on=contest.check_name if contest.check_work is not None else "",
                timed=ready[name].timed,
            )
            self.rows.append(row)
        if stopped is not None:
            raise stopped

    # ---- what a provider costs ----

    def _row(self, provider: Provider, direction: str) -> Row:
        return replace(
            self.contest.template,
            provider=provider.name,
            provider_version=provider.version(),
            direction=direction,
            environment=self.session.environment,
        )

    def _try(self, provider: Provider, action: Callable[[], Any], direction: str | None) -> Any:
        """The result of `action`; None, and failed rows, where the provider raises."""
        try:
            result = action()
            if self.contest.work.device == "cuda":
                torch.cuda.synchronize()
            return result
        except Exception as error:  # a provider that crashes costs its own rows, whatever it raises
            reason = describe(error)
            directions = [direction] if direction else list(self.contest.calls)
        self._give_up([self._row(provider, name) for name in directions], reason)
        return None

    def _give_up(self, rows: Sequence[Row], reason: str) -> None:
        """Failed rows for a provider, and the memory that it held."""
        failed = [row.without_time("failed", reason) for row in rows]
        gc.collect()  # the traceback held the provider's tensors
        release_or_lose(self.contest.work.device, failed, reason)
        self.rows += failed


def release_or_lose(device: str, failed: Sequence[Row], reason: str) -> None:
    """Gives back memory after a failure.

    Raises:
        DeviceLostError: with the failed rows, where nothing runs on the GPU any more.
    """
    try:
        release_memory(device)
    except RuntimeError as error:
        raise DeviceLostError(failed, reason) from error


def make_yardstick(
    references: Sequence[Provider], work: Any, results: Callable[[Bound, Any], tuple[Named, float]]
) -> Yardstick:
    """Exact results and limits of `work`, whose dtype is that of the measurement."""
    wide = work.to(torch.float64)
    exact, sent_back = results(references[0].prepare(wide), wide)
    del wide
    yardstick = None
    for reference in references:
        if reference.missing(work):
            continue
        eager, _ = results(reference.prepare(work), work)
        found = Yardstick.measure(exact, eager, work.dtype, sent_back)
        yardstick = found if yardstick is None else yardstick.loosened(found)
    if yardstick is None:
        raise ValueError("no reference can compute this work")
    return yardstick


def op_results(bound: Bound, work: Any) -> tuple[Named, float]:
    """(outputs of a call and the gradients of `work.leaves`, norm of the random gradients that were sent back)."""
    outputs = as_tuple(bound())
    weights = weights_like(outputs)
    gradients = torch.autograd.grad(outputs, list(work.leaves.values()), weights, allow_unused=True)
    named: dict[str, Tensor | None] = {}
    for index, output in enumerate(outputs):
        named[OUTPUT if len(outputs) == 1 else f"{OUTPUT} {index}"] = output.detach()
    named |= {f"gradient of {name}": gradient for name, gradient in zip(work.leaves, gradients, strict=True)}
    return named, norm(weights)


def forward_call(bound: Bound, work: Any) -> Call:
    def forward() -> Outputs:
        with torch.no_grad():
            return bound()

    return forward


def forward_backward_call(bound: Bound, work: Any) -> Call:
    with torch.no_grad():
        weights = weights_like(as_tuple(bound()))
    leaves = list(work.leaves.values())

    def forward_backward() -> Sequence[Tensor | None]:
        return torch.autograd.grad(as_tuple(bound()), leaves, weights, allow_unused=True)

    return forward_backward


OP_CALLS = {FORWARD: forward_call, FORWARD_BACKWARD: forward_backward_call}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
