"""The order of cases, what is measured again and what is not, and the ceilings behind the shares."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from bench_toys import make_row, toy_case

from opensora_fast.benchmarks.measuring.gpu_state import GpuState
from opensora_fast.benchmarks.measuring.race import Check, Entry, relative_check, run_race
from opensora_fast.benchmarks.measuring.refused import REFUSED_FILE, Refused, append_refused, read_refused
from opensora_fast.benchmarks.measuring.session import CaseStopped, DeviceLostError, Session, threads_of
from opensora_fast.benchmarks.measuring.timing import FEWEST_ROUNDS, Sampling, Times, time_interleaved
from opensora_fast.benchmarks.processes import DONE, RUNNING_FILE, WRONG, Death, Plan
from opensora_fast.benchmarks.rows import read_folder
from opensora_fast.benchmarks.running.runner import Report, run_cases
from opensora_fast.benchmarks.running.worker import kept_refusals, kept_rows, print_report, record_deaths
from opensora_fast.costs.operations import Count
from opensora_fast.cpu_threads import cpu_threads


def test_the_most_valuable_case_comes_first():
    order = []
    cases = [
        toy_case(["eager"], size, value, lambda size=size: order.append(size))
        for size, value in ((8, 1), (16, 3), (32, 2))
    ]
    run_cases(cases, Session("cpu"))
    assert order == [16, 32, 8]


def test_finished_rows_are_not_measured_again(tmp_path):
    measured = []
    case = toy_case(["eager"], on_measure=lambda: measured.append("eager"))
    run_cases([case], Session("cpu", tmp_path))
    all_three = toy_case(["eager", "other", "absent"], on_measure=lambda: measured.append("all"))
    report = run_cases([all_three], Session("cpu", tmp_path), read_folder(tmp_path))
    assert measured == ["eager", "all"] and report.finished_before == 2
    assert {row.provider for row in report.rows} == {"other", "absent"}
    assert run_cases([all_three], Session("cpu", tmp_path), read_folder(tmp_path)).rows == []
    assert len(read_folder(tmp_path)) == 6


def test_failed_and_unavailable_rows_count_as_finished(tmp_path):
    case = toy_case(["eager", "crash", "absent"])
    run_cases([case], Session("cpu", tmp_path))
    assert len(read_folder(tmp_path)) == 6
    assert run_cases([case], Session("cpu", tmp_path), read_folder(tmp_path)).rows == []


def test_refresh_measures_what_has_no_time_and_rows_of_other_sources_again():
    """A library may have been installed since, or repaired; but nothing is tried twice in one run."""
    plan = Plan("all", "cpu", "rows", started="2026-11-23", refresh=True)
    old, new = "2026-11-22", "2026-11-24"
    fine = make_row(provider="fine", date=old)
    own = fine.environment
    absent = make_row(provider="absent", date=old).without_time("unavailable", "it is not installed")
    failed_now = make_row(provider="failed now", date=new).without_time("failed", "boom")
    rows = [fine, make_row(provider="older", date=old, commit="b" * 40), absent, failed_now]
    assert kept_rows(plan, rows, own) == [fine, failed_now]
    assert kept_rows(replace(plan, refresh=False), rows, own) == rows
    for unknown in ({"dirty": True}, {"commit": ""}):  # the sources may have changed since, and say the same
        before, now = (make_row(date=date, **unknown) for date in (old, new))
        assert kept_rows(plan, [before, now], now.environment) == [now]

    items = [
        {"key": [name], "commit": own.commit, "dirty": False, "date": date} for name, date in (("a", old), ("b", new))
    ]
    assert kept_refusals(plan, items, own) == {("b",)}
    assert kept_refusals(replace(plan, refresh=False), items, own) == {("a",), ("b",)}
    for unknown in ({"dirty": True}, {"commit": ""}):  # of the processes of this run all the same
        changed, of_run = replace(own, **unknown), replace(plan, refresh=False)
        assert kept_refusals(of_run, [item | unknown for item in items], changed) == {("b",)}


@pytest.mark.parametrize("provider", ["other", "absent", "crash"])
def test_only_the_directions_that_are_missing_are_measured(provider):
    case = toy_case(["eager", provider])
    rows = run_cases([case], Session("cpu")).rows
    kept = [row for row in rows if (row.provider, row.direction) != (provider, "forward+backward")]
    again = run_cases([case], Session("cpu"), kept).rows
    assert [(row.provider, row.direction) for row in again] == [(provider, "forward+backward")]


@pytest.mark.parametrize("keys", ["of one provider", "none"])
def test_deaths_become_failed_rows(tmp_path, keys):
    case = toy_case(["eager", "other"])
    session = Session("cpu", tmp_path)
    at_fault = [list(key) for key in case.planned_rows() if "other" in key] if keys == "of one provider" else []
    death = Death(case.identity, at_fault, "its process was ended by SIGSEGV (check)")
    record_deaths([death, death], [case], session)
    rows = read_folder(tmp_path)
    assert {row.provider for row in rows} == ({"other"} if at_fault else {"eager", "other"})
    assert len(rows) == (2 if at_fault else 4)
    assert {(row.status, row.reason) for row in rows} == {("failed", death.reason)}
    assert all(row.environment.device_name.startswith("cpu") for row in rows)
    assert record_deaths([death], [case], session, rows) == []  # a row that is kept says it already


def test_a_case_that_fails_as_a_whole_costs_its_rows_only():
    def explode() -> None:
        raise MemoryError("the float64 reference does not fit")

    report = run_cases([toy_case(["eager", "other"], 8, 2.0, explode), toy_case(["eager"], 16)], Session("cpu"))
    failed = [row for row in report.rows if row.status == "failed"]
    assert len(failed) == 4 and {row.reason for row in failed} == {"MemoryError: the float64 reference does not fit"}
    assert [row.status for row in report.rows if row.workload == "size 16"] == ["ok", "ok"]


def test_a_device_that_is_lost_behind_a_case_needs_another_process(tmp_path, monkeypatch):
    """As where an illegal memory access shows only when the memory is given back."""

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("opensora_fast.benchmarks.running.runner.release_memory", lost)
    session = Session("cpu", tmp_path)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run_cases([toy_case(["eager"])], session)
    assert {row.status for row in read_folder(tmp_path)} == {"ok"}  # what was measured is kept


def test_what_a_case_knew_before_the_device_was_lost_is_kept(tmp_path):
    plain = toy_case(["eager", "crash", "slightly-wrong"])

    def measure(session, names):
        rows, refused = plain.measure(session, names)
        lost = DeviceLostError([row for row in rows if row.provider == "crash"], "CUDA error")
        lost.rows_before, lost.refused = [row for row in rows if row.provider != "crash"], refused
        raise lost

    report = Report()
    with pytest.raises(DeviceLostError):
        run_cases([replace(plain, measure=measure)], Session("cpu", tmp_path), report=report)
    rows = read_folder(tmp_path)
    assert sorted((row.provider, row.status) for row in rows) == [("crash", "failed")] * 2 + [("eager", "ok")] * 2
    assert len(report.rows) == 4 and len(report.refused) == len(read_refused(tmp_path)) == 2


@pytest.mark.parametrize("provider", ["ours", "slightly-wrong"])
def test_what_a_process_before_found_wrong_belongs_to_the_run(tmp_path, capsys, provider):
    """One that was ended since: this one does not measure it again."""
    case, session = replace(toy_case(["eager"]), providers=("eager", provider)), Session("cpu", tmp_path)
    wrong = next(row for row in case.planned_rows().values() if row.provider == provider)
    session.record([], [Refused(replace(wrong, environment=session.environment), "output", 0.5, 0.1)] * 2)
    plan = Plan("all", "cpu", str(tmp_path), started="2000")
    assert print_report(Report(), [case], plan, session, tmp_path) == (WRONG if provider == "ours" else DONE)
    told = f"wrong, so no time: op toy forward size 64 {provider}: the error of its output is 0.5, over its limit 0.1"
    assert capsys.readouterr().out.count(told) == 1
    later = replace(plan, started="9999")
    assert print_report(Report(), [case], later, session, tmp_path) == DONE


def test_what_was_wrong_comes_back_with_where_it_was_measured(tmp_path):
    row = make_row(dirty=True)
    append_refused(tmp_path, [Refused(row, "output", 0.5, 0.1)])
    (item,) = read_refused(tmp_path)
    assert tuple(item["key"]) == row.key
    found = {name: item[name] for name in ("device_name", "commit", "dirty", "date")}
    assert found == {name: getattr(row.environment, name) for name in found}
    with (tmp_path / REFUSED_FILE).open("a") as file:
        file.write('{"name": "op')
    with pytest.raises(ValueError, match=r"refused\.jsonl:2: not a refused row: .*; delete this line"):
        read_refused(tmp_path)


def test_an_interruption_keeps_what_was_recorded(tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    report = Report()
    with pytest.raises(KeyboardInterrupt):
        run_cases(
            [toy_case(["eager"], 8, 2.0), toy_case(["eager"], 16, 1.0, interrupt)],
            Session("cpu", tmp_path),
            report=report,
        )
    assert len(report.rows) == len(read_folder(tmp_path)) == 2


@pytest.mark.parametrize("samples", [FEWEST_ROUNDS - 1, FEWEST_ROUNDS])
def test_a_race_that_is_stopped_keeps_what_is_known(samples):
    """The entry that cannot run, the one that is wrong, and the times of the third, if there are enough."""
    calls = []

    def third() -> None:
        calls.append(None)
        if len(calls) > 2 + 3 + samples:  # check and memory, warming up, samples
            raise KeyboardInterrupt

    entries = [
        Entry("absent", "1", "copy", lambda: None, missing="not here"),
        Entry("wrong", "1", "copy", lambda: (lambda: None, lambda: Check(1.0, 0.5))),
        Entry("third", "1", "copy", lambda: (third, lambda: Check(0.0, 0.0))),
    ]
    template = make_row(level="copy", op="", workload="x")
    with pytest.raises(CaseStopped) as stopped:
        run_race(template, entries, Sampling(10.0, min_samples=10**9), Session("cpu"))
    known = [(row.provider, row.status, row.samples) for row in stopped.value.rows]
    third_row = [("third", "ok", samples)] if samples >= FEWEST_ROUNDS else []
    assert known == [("absent", "unavailable", 30), *third_row]
    assert [item.row.provider for item in stopped.value.refused] == ["wrong"]


def test_without_time_left_nothing_begins():
    session = Session("cpu", deadline=0.0)
    report = run_cases([toy_case(["eager"])], session)
    assert report.rows == [] and len(report.left) == 1


def test_a_case_that_would_not_end_in_time_leaves_it_to_shorter_ones():
    order = []
    cases = [
        replace(toy_case(["eager"], size, value, lambda size=size: order.append(size)), seconds=seconds)
        for size, value, seconds in ((8, 3, 100.0), (16, 2, 5.0), (32, 1, 1000.0))
    ]
    report = run_cases(cases, Session("cpu", deadline=time.time() + 30))
    assert order == [16] and [case.template.workload for case in report.left] == ["size 8", "size 32"]
    order.clear()
    run_cases(cases, Session("cpu"))
    assert order == [8, 16, 32]


def test_a_careful_case_times_each_provider_alone():
    groups = []
    case = toy_case(["eager", "other"], on_measure=lambda: groups.append(1))
    run_cases([case], Session("cpu"), careful=frozenset([case.identity]))
    assert len(groups) == 2


def test_a_careful_case_that_fails_as_a_whole_fails_once_for_each_row():
    def explode() -> None:
        raise MemoryError("the float64 reference does not fit")

    case = toy_case(["eager", "other"], on_measure=explode)
    report = run_cases([case], Session("cpu"), careful=frozenset([case.identity]))
    assert [(row.provider, row.status) for row in report.rows] == [("eager", "failed")] * 2 + [("other", "failed")] * 2


def test_shares_follow_the_ceilings_measured_in_the_run():
    session = Session("cpu")
    session.device = "cuda"
    row = make_row(flops=1e9, bytes=4e9, p50_ms=2.0)
    assert math.isnan(session.with_roofline_share(row).roofline_share)
    session.learn([make_row(level="copy", bytes=4e9, p50_ms=1.0, dtype="uint8")])  # 4 TB/s
    session.learn([make_row(flops=1e13, bytes=4e10, p50_ms=1.0)])  # nothing but copies and products sets a ceiling
    assert math.isnan(session.with_roofline_share(row).roofline_share)
    session.learn([make_row(level="gemm", flops=1e12, p50_ms=1.0), make_row(level="gemm", flops=5e11, p50_ms=1.0)])
    # 1 µs of products under 1 ms of bytes, overlapped in an op and added up in a step.
    assert session.with_roofline_share(row).roofline_share == pytest.approx(0.5)
    step = make_row(level="step", flops=1e12, bytes=4e9, p50_ms=4.0)
    assert session.with_roofline_share(step).roofline_share == pytest.approx(0.5)
    other = make_row(dtype="float32")
    assert math.isnan(session.with_roofline_share(other).roofline_share)
    session.device = "cpu"
    assert math.isnan(session.with_roofline_share(row).roofline_share)


def test_a_run_that_goes_on_knows_the_ceilings_measured_before():
    session = Session("cpu")
    session.device = "cuda"
    run_cases([], session, [make_row(level="copy", bytes=4e9, dtype="uint8"), make_row(level="gemm", flops=1e12)])
    ceilings = session.ceilings("bfloat16")
    assert (ceilings.matrix_flops, ceilings.bandwidth) == pytest.approx((1e15, 4e12))


def test_a_row_holds_percentiles_of_one_call_and_the_share_of_the_ceilings_known_with_it():
    session = Session("cpu")
    session.device = "cuda"
    session.learn([make_row(level="copy", bytes=4e9, p50_ms=1.0, dtype="uint8")])
    times = Times(tuple(float(sample) for sample in range(101)))  # of ten calls
    products = make_row(level="gemm")
    row = session.complete(
        products, times, 10, 2**20, Count(1e12, 0.0), (0.1, 0.2), GpuState("1740", "3201", "698"), timed="graph"
    )
    assert (row.sm_clock_mhz, row.memory_clock_mhz, row.power_w) == ("1740", "3201", "698")
    assert (row.samples, row.p20_ms, row.p50_ms, row.p80_ms) == (101, 2.0, 5.0, 8.0)
    assert (row.status, row.error, row.error_limit, row.memory_bytes, row.timed) == ("ok", 0.1, 0.2, 2**20, "graph")
    assert row.roofline_share == pytest.approx(1.0)


def test_the_middle_of_an_even_number_of_samples_lies_between_two():
    times = Times((1.0, 2.0, 3.0, 9.0))
    row = Session("cpu").complete(make_row(), times, 1, 0, Count(), (0.1, 0.2), GpuState())
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == (2.0, 2.5, 3.0)


def test_near_the_end_of_the_budget_a_case_samples_for_half_of_what_is_left():
    assert Session("cpu", seconds_factor=0.5).sampling_seconds(100.0) == 50.0
    assert Session("cpu", deadline=time.time() + 60).sampling_seconds(100.0) == pytest.approx(30, abs=5)
    assert Session("cpu", deadline=time.time() - 60).sampling_seconds(100.0) == 0.0


def test_one_thread_measures_on_the_cpu():
    with cpu_threads(2):
        with threads_of("cpu"):
            assert torch.get_num_threads() == 1
        with threads_of("cuda"):
            assert torch.get_num_threads() == 2


def test_times_are_taken_in_turn():
    order = []
    times = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", Sampling(0.0, warm_up=1)
    )
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert len(times["a"].milliseconds) == 3
    turns = sorted((*times["a"].turns, *times["b"].turns))
    assert [turn in times["a"].turns for turn in turns] == [True, False] * 3
    assert all(end <= begin for (_, end), (begin, _) in pairwise(turns))
    assert time_interleaved({"a": lambda: None}, "cpu", Sampling(10.0, min_samples=30))["a"].milliseconds[0] >= 0


@pytest.mark.parametrize(
    ("min_samples", "samples"),
    [(5, 26), (60, 60), (1000, 100)],
    ids=["a quarter of the budget", "enough samples", "the whole budget"],
)
def test_sampling_goes_on_for(min_samples, samples, monkeypatch):
    calls = []  # of one second each
    clock = SimpleNamespace(perf_counter=lambda: 1000 + len(calls), time=time.time)
    monkeypatch.setattr("opensora_fast.benchmarks.measuring.timing.time", clock)
    times = time_interleaved({"a": lambda: calls.append(None)}, "cpu", Sampling(100.0, min_samples, warm_up=0))
    assert times["a"].milliseconds == (1e3,) * samples


def test_warming_up_ends_with_the_budget():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.02)

    times = time_interleaved({"slow": call}, "cpu", Sampling(0.01, warm_up=50))
    assert len(times["slow"].milliseconds) == FEWEST_ROUNDS and len(calls) == 1 + FEWEST_ROUNDS


@pytest.mark.parametrize("providers", [["a"], ["a", "b"]], ids=["alone", "beside another"])
def test_who_is_sampled_alone_in_a_race_is_named_while_it_runs(tmp_path, providers):
    running = []

    def call() -> None:
        running.append(json.loads((tmp_path / RUNNING_FILE).read_text()))

    entries = [Entry(name, "1", "copy", lambda: (call, lambda: Check(0.0, 0.0))) for name in providers]
    rows, _ = run_race(toy_case(["eager"]).template, entries, Sampling(0.01), Session("cpu", tmp_path))
    assert running[0] == {"case": "", "keys": [list(rows[0].key)], "stage": "check"}
    assert running[-1] == {"case": "", "keys": [list(rows[0].key)] if len(rows) == 1 else [], "stage": "samples"}


def test_who_crashes_in_a_race_costs_its_own_row():
    left = iter(range(3))  # the check, its memory, and one call to warm up

    def tired() -> None:
        if next(left, None) is None:
            raise RuntimeError("tired")

    def broken() -> None:
        raise RuntimeError("boom")

    def entry(provider: str, call: Callable[[], None]) -> Entry:
        return Entry(provider, "1", "copy", lambda: (call, lambda: Check(0.0, 0.0)))

    entries = [entry("broken", broken), entry("tired", tired), entry("works", lambda: None)]
    rows, _ = run_race(toy_case(["eager"]).template, entries, Sampling(0.01), Session("cpu"))
    assert [(row.provider, row.status, row.reason) for row in rows] == [
        ("broken", "failed", "RuntimeError: boom"),
        ("tired", "failed", "RuntimeError: tired"),
        ("works", "ok", ""),
    ]


def test_the_check_of_a_race_is_relative_to_the_exact_result():
    exact = torch.tensor([3.0, 4.0])
    assert relative_check(torch.tensor([3.0, 4.5]), exact, 0.2) == Check(pytest.approx(0.1), 0.2)
    assert relative_check(torch.tensor([3.0, math.nan]), exact, 0.2).error == math.inf
    assert relative_check(torch.zeros(2), torch.zeros(2), 0.2).error == 0.0


def test_a_race_refuses_what_its_check_finds_wrong():
    def entry(provider: str, error: float) -> Entry:
        return Entry(provider, "1", "copy", lambda: ((lambda: None), lambda: Check(error, 0.5)), calls_per_sample=10)

    template = toy_case(["eager"]).template
    entries = [entry("right", 0.1), entry("wrong", 0.6), entry("nan", math.nan), Entry("none", "", "copy", None, "no")]
    rows, refused = run_race(template, entries, Sampling(0.01), Session("cpu"))
    assert [(row.provider, row.status) for row in rows] == [("none", "unavailable"), ("right", "ok")]
    assert [item.row.provider for item in refused] == ["wrong", "nan"]
