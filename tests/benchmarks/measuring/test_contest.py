"""A wrong provider gets no time; one that crashes or is absent costs its own rows only."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from bench_toys import crash, make_toy_work, toy_contest

from opensora_fast.benchmarks.measuring.contest import make_yardstick, run_contest
from opensora_fast.benchmarks.measuring.provider import Provider, choose_providers, of_function
from opensora_fast.benchmarks.measuring.session import DeviceLostError, Session
from opensora_fast.benchmarks.measuring.timing import Sampling
from opensora_fast.benchmarks.processes import RUNNING_FILE
from opensora_fast.benchmarks.rows import Row


def by_provider(rows: list[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.provider, []).append(row)
    return grouped


@pytest.fixture
def session():
    return Session("cpu")


def test_every_provider_that_is_right_gets_a_row_for_each_direction(session):
    rows, refused = run_contest(toy_contest(["eager", "other"]), session)
    assert not refused
    for provider in ("eager", "other"):
        found = by_provider(rows)[provider]
        assert [row.direction for row in found] == ["forward", "forward+backward"]
        for row in found:
            assert row.status == "ok" and row.samples >= 3
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.error <= row.error_limit < 1e-5
            assert row.environment.device_name.startswith("cpu-")
    assert [row.flops for row in by_provider(rows)["other"]] == [64.0, 192.0]


def test_a_wrong_output_gets_no_time(session):
    rows, refused = run_contest(toy_contest(["eager", "slightly-wrong"]), session)
    assert set(by_provider(rows)) == {"eager"}
    assert [(item.row.provider, item.row.direction) for item in refused] == [
        ("slightly-wrong", "forward"),
        ("slightly-wrong", "forward+backward"),
    ]
    assert all(item.error > item.limit for item in refused)
    assert "output" in str(refused[0]) and "over its limit" in str(refused[0])


@pytest.mark.parametrize("check_size", [None, 16])
def test_a_wrong_gradient_costs_the_time_of_the_backward_pass_alone(session, check_size):
    rows, refused = run_contest(toy_contest(["eager", "wrong-backward"], check_size=check_size), session)
    assert [(row.direction, row.status) for row in by_provider(rows)["wrong-backward"]] == [("forward", "ok")]
    (item,) = refused
    assert (item.row.provider, item.row.direction) == ("wrong-backward", "forward+backward")
    assert item.error > item.limit and "gradient of b" in str(item)


def test_a_gradient_that_is_wrong_on_the_timed_inputs_only_costs_that_time_alone(session):
    def lose_when_large(work):
        a, b = work.leaves["a"], work.leaves["b"]
        return a * (b if b.numel() < 64 else b.detach())

    contest = toy_contest(["eager"], check_size=16)
    rows, refused = run_contest(replace(contest, providers=[Provider("loses", of_function(lose_when_large))]), session)
    assert [(row.direction, row.status) for row in rows] == [("forward", "ok")]
    assert [(item.row.direction, item.result) for item in refused] == [
        ("forward+backward", "gradient of b of the timed inputs")
    ]


def test_a_direction_that_is_finished_is_not_tried_again(session):
    contest = toy_contest(["eager"])
    rows, _ = run_contest(contest, session)
    session.finished = {rows[0].key}
    again, _ = run_contest(contest, session)
    assert [row.direction for row in again] == ["forward+backward"]


def test_who_cannot_even_say_whether_it_can_run_costs_its_own_rows(session):
    contest = toy_contest(["eager", "other"])
    broken = replace(contest.providers[1], name="broken", missing=lambda work: 1 / 0)
    rows, _ = run_contest(replace(contest, providers=[contest.providers[0], broken]), session)
    assert {(row.provider, row.status, row.reason) for row in rows} == {
        ("eager", "ok", ""),
        ("broken", "failed", "ZeroDivisionError: division by zero"),
    }


@pytest.mark.parametrize("others", [[], ["eager"]], ids=["alone", "beside another"])
def test_who_is_sampled_alone_is_named_while_it_runs(tmp_path, others):
    """If the process dies then, it was this provider; among several nobody could tell."""
    running = []

    def watched(work):
        def call():
            running.append(json.loads((tmp_path / RUNNING_FILE).read_text()))
            return work.leaves["a"] * work.leaves["b"]

        return call

    contest = toy_contest(["eager", *others])
    contest = replace(
        contest,
        providers=[Provider("watched", watched), *contest.providers[1:]],
        calls={"forward": contest.calls["forward"]},
    )
    rows, _ = run_contest(contest, Session("cpu", tmp_path))
    assert running[0] == {"case": "", "keys": [list(rows[0].key)], "stage": "check"}
    assert running[-1] == {"case": "", "keys": [] if others else [list(rows[0].key)], "stage": "samples"}


def test_a_row_tells_the_error_of_what_its_direction_computes(session):
    """This provider's outputs are eager's, its gradients a little larger."""

    def multiply(work):
        product = work.leaves["a"] * work.leaves["b"]
        return product + 3e-7 * (product - product.detach())

    contest = toy_contest(["eager"])
    rows, refused = run_contest(replace(contest, providers=[Provider("ours", of_function(multiply))]), session)
    assert not refused
    forward, backward = rows
    assert (forward.direction, backward.direction) == ("forward", "forward+backward")
    assert forward.error < 1e-7 < 2e-7 < backward.error < 4e-7


def test_the_limits_are_those_of_the_references_that_can_run_here(session):
    contest = toy_contest(["eager", "absent", "slightly-wrong"])
    eager, absent, slightly_wrong = contest.providers
    alone, with_absent, with_loose = (
        make_yardstick(references, contest.work, contest.results).limits["output"]
        for references in ([eager], [eager, absent], [eager, slightly_wrong])
    )
    assert alone == with_absent < 1e-6 and with_loose == pytest.approx(2e-4, rel=0.01)
    with pytest.raises(ValueError, match="no reference can compute this work"):
        make_yardstick([replace(eager, missing=absent.missing)], contest.work, contest.results)


def test_a_result_that_is_wrong_on_the_timed_inputs_only_gets_no_time(session):
    contest = toy_contest(["eager", "wrong-when-large"], size=64, check_size=16)
    rows, refused = run_contest(contest, session)
    assert set(by_provider(rows)) == {"eager"}
    assert {item.row.provider for item in refused} == {"wrong-when-large"}
    assert "timed inputs" in str(refused[0])
    assert {row.checked_on for row in rows} == {"size 16"}


def when_large(error):
    """Eager PyTorch, for which the timed inputs are too much."""

    def multiply(work):
        if work.leaves["a"].numel() == 64:
            raise error
        return work.leaves["a"] * work.leaves["b"]

    return Provider("eager", of_function(multiply))


def test_rows_say_where_the_timed_inputs_are_too_large_for_eager(session):
    contest = toy_contest(["eager", "wrong-when-large"], size=64, check_size=16)
    reference = when_large(torch.OutOfMemoryError("CUDA out of memory"))
    rows, refused = run_contest(replace(contest, references=(reference,)), session)
    assert not refused and {row.status for row in rows} == {"ok"}
    assert {row.checked_on for row in rows} == {"size 16 alone: eager runs out of memory on the timed inputs"}


def test_another_error_of_eager_on_the_timed_inputs_is_no_excuse(session):
    contest = toy_contest(["eager", "wrong-when-large"], size=64, check_size=16)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_contest(replace(contest, references=(when_large(RuntimeError("illegal memory access")),)), session)


def test_where_float64_does_not_fit_smaller_inputs_are_compared(session):
    def multiply_if_it_fits(work):
        if work.dtype == torch.float64 and work.leaves["a"].numel() > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work.leaves["a"] * work.leaves["b"]

    reference = Provider("eager", of_function(multiply_if_it_fits))
    contest = replace(
        toy_contest(["eager", "wrong-when-large"]),
        references=(reference,),
        smaller=lambda: (make_toy_work(16), "size 16"),
    )
    rows, refused = run_contest(contest, session)
    assert {(row.provider, row.status, row.checked_on) for row in rows} == {("eager", "ok", "size 16")}
    assert {item.row.provider for item in refused} == {"wrong-when-large"}  # by eager's results on the timed inputs
    with pytest.raises(torch.OutOfMemoryError):
        run_contest(replace(contest, smaller=None), session)


@pytest.mark.parametrize(
    ("name", "reason"), [("crash", "RuntimeError: boom"), ("out-of-memory", "OutOfMemoryError: CUDA out of memory")]
)
def test_a_crash_costs_its_own_rows(session, name, reason):
    rows, refused = run_contest(toy_contest([name, "eager", "other"]), session)
    assert not refused
    grouped = by_provider(rows)
    assert {row.status for row in grouped["eager"] + grouped["other"]} == {"ok"}
    assert [row.status for row in grouped[name]] == ["failed", "failed"]
    assert all(row.reason.startswith(reason) and "\n" not in row.reason for row in grouped[name])
    assert all(math.isnan(row.p50_ms) for row in grouped[name])


@pytest.mark.parametrize("large", [False, True])
def test_a_crash_between_samples_costs_its_own_row(session, large):
    """The call works four times, then never again: behind the first call and that for its memory."""
    left = iter(range(4))

    def works_at_first(work):
        def call():
            if not torch.is_grad_enabled() and next(left, None) is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work.leaves["a"] * work.leaves["b"]

        return call

    contest = toy_contest(["eager", "other"])
    contest = replace(
        contest,
        providers=[Provider("tired", works_at_first), *contest.providers],
        calls={"forward": contest.calls["forward"]},
        sampling=replace(contest.sampling, large=large),
    )
    rows, refused = run_contest(contest, session)
    assert not refused
    grouped = by_provider(rows)
    assert [row.status for row in grouped["eager"] + grouped["other"]] == ["ok", "ok"]
    (failed,) = grouped["tired"]
    assert failed.status == "failed" and failed.reason == "OutOfMemoryError: CUDA out of memory"


def test_a_sample_of_many_calls_is_divided(session):
    contest = replace(toy_contest(["eager"]), sampling=Sampling(0.0, warm_up=0))
    slow = {"forward": lambda bound, work: lambda: time.sleep(0.02)}
    (once,), _ = run_contest(replace(contest, calls=slow), session)
    (tenth,), _ = run_contest(replace(contest, calls=slow, calls_per_sample=10), session)
    assert once.p50_ms >= 20 and 2 <= tenth.p50_ms < 0.5 * once.p50_ms
    assert tenth.p20_ms <= tenth.p50_ms <= tenth.p80_ms < once.p20_ms


def test_an_absent_provider_says_why(session):
    rows, _ = run_contest(toy_contest(["eager", "absent"]), session)
    assert {(row.status, row.reason) for row in by_provider(rows)["absent"]} == {
        ("unavailable", "absent is not installed")
    }


def test_a_lost_device_stops_the_contest_with_the_rows_of_who_lost_it(session, monkeypatch):
    """As after an illegal memory access: releasing memory fails too."""

    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    contest = toy_contest(["crash", "eager"])
    calls = iter([None])  # the first release, behind the check, still works
    monkeypatch.setattr(
        "opensora_fast.benchmarks.measuring.contest.release_memory", lambda device: next(calls, "lost") and lost(device)
    )
    with pytest.raises(DeviceLostError, match="boom") as caught:
        run_contest(contest, session)
    assert [(row.provider, row.status) for row in caught.value.rows] == [("crash", "failed"), ("crash", "failed")]


def test_who_was_wrong_before_the_device_was_lost_is_told(session, monkeypatch):
    """What is wrong may lose the device as well: it is not to be tried again."""

    def lose(work):
        if work.leaves["a"].numel() == 64:
            monkeypatch.setattr("opensora_fast.benchmarks.measuring.contest.release_memory", crash)
            raise RuntimeError("boom")
        return work.leaves["a"] * work.leaves["b"]

    contest = toy_contest(["eager", "slightly-wrong", "wrong-when-large"], check_size=16)
    contest = replace(contest, providers=[*contest.providers[1:], Provider("loses", of_function(lose))])
    with pytest.raises(DeviceLostError) as caught:
        run_contest(contest, session)
    assert {row.provider for row in caught.value.rows} == {"loses"}
    assert [(item.row.provider, item.row.direction) for item in caught.value.refused] == [
        (wrong, direction) for wrong in ("slightly-wrong", "wrong-when-large") for direction in contest.calls
    ]


def test_a_device_that_is_lost_later_costs_no_row_of_before(session, monkeypatch):
    """Who was wrong in the check, and the times of the direction that was over."""

    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lose(bound, work):
        monkeypatch.setattr("opensora_fast.benchmarks.measuring.contest.release_memory", lost)
        raise RuntimeError("boom")

    contest = toy_contest(["eager", "slightly-wrong", "absent"])
    contest = replace(contest, calls=dict(contest.calls) | {"forward+backward": lose})
    with pytest.raises(DeviceLostError, match="boom") as caught:
        run_contest(contest, session)
    assert [(row.provider, row.direction) for row in caught.value.rows] == [("eager", "forward+backward")]
    before = [(row.provider, row.direction, row.status) for row in caught.value.rows_before]
    absent = [("absent", direction, "unavailable") for direction in contest.calls]
    assert before == [*absent, ("eager", "forward", "ok")]
    assert {item.row.provider for item in caught.value.refused} == {"slightly-wrong"}


def test_unknown_providers_are_named():
    with pytest.raises(ValueError, match="provider 'flash-attn-9' is unknown; known: eager"):
        choose_providers(toy_contest(["eager"]).providers, ["flash-attn-9"])


def test_nothing_is_random_between_providers(session):
    contest = toy_contest(["eager"])
    first, _ = contest.results(contest.providers[0].prepare(contest.work), contest.work)
    second, _ = contest.results(contest.providers[0].prepare(contest.work), contest.work)
    assert all(torch.equal(first[name], second[name]) for name in first)
