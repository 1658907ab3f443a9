"""The table at the end of a run."""

from dataclasses import replace

from bench_toys import make_row, toy_case

from opensora_fast.benchmarks.report.summary import format_plan, format_reasons, format_table
from opensora_fast.benchmarks.suites import list_cases
from opensora_fast.benchmarks.suites.estimates import STARTUP_S


def test_the_fastest_comes_first_and_work_stays_together():
    rows = [
        make_row(provider="eager", p50_ms=2.0),
        make_row(op="gelu_tanh", provider="eager", p50_ms=0.5),
        make_row(provider="ours", p50_ms=1.0, roofline_share=0.87),
        make_row(provider="liger").without_time("failed", "boom"),
    ]
    lines = format_table(rows).splitlines()
    assert lines[0].split()[:5] == ["level", "op", "direction", "workload", "provider"]
    assert [line.split()[4] if line else "" for line in lines[1:]] == ["ours", "eager", "", "eager"]
    assert "87%" in lines[1] and lines[1].endswith("85–92 % of copy")
    assert "GB/s" in lines[0] and "2000" in lines[1]


def test_columns_that_nobody_needs_are_left_out():
    header = format_table([make_row(flops=0.0, provider="eager")]).splitlines()[0]
    assert "TFLOP/s" not in header and "predicted" not in header


def test_nothing_measured_is_said():
    assert format_table([make_row().without_time("failed", "boom")]) == "no row with a time"


def test_reasons_are_told_once():
    row = make_row(provider="xformers").without_time("unavailable", "not installed")
    other = make_row(provider="compile").without_time("failed", "out of memory")
    assert format_reasons([row, other, row, make_row()]).splitlines() == [
        "compile: failed (1 rows): out of memory",
        "xformers: unavailable (2 rows): not installed",
    ]


def test_the_plan_says_what_fits_into_one_and_two_runs():
    seconds = (480.0 - STARTUP_S, 50.0, 100.0, 300.0, 200.0)
    cases = [replace(toy_case(["eager"], 8 * (index + 1)), seconds=value) for index, value in enumerate(seconds)]
    lines = format_plan(cases, "H200").splitlines()
    marks = [index for index, line in enumerate(lines) if line.startswith("----")]
    assert marks == [2, 5] and "540 s" in lines[2] and "1080 s" in lines[5]
    # The second run starts anew.
    assert f"{480 + 50 + 100 + STARTUP_S:.0f} s" in lines[3]
    assert lines[-1] == "5 cases, 10 rows"
    on_cpu = format_plan([toy_case(["eager"]), *cases]).splitlines()  # the first takes nobody knows how long
    assert not any("----" in line or f"{480:.0f} s" in line for line in on_cpu) and on_cpu[1].startswith("  430 s  op")
    plain = format_plan([toy_case(["eager"])]).splitlines()
    assert plain[0].startswith("op toy size 8  [N=8]  eager") or plain[0].startswith("op toy size 64")


def test_the_plan_for_a_gpu_says_what_is_expected():
    text = format_plan(list_cases("push", "cuda", None, ["spatial_attention", "240p"]), "H200")
    assert "predicted on an H200: forward ours 260–360 TFLOP/s" in text
    assert "forward ours 228–343 TFLOP/s" in text  # wide norm weights: the ordinary softmax
    assert "----" not in text
