"""The table at the end of a run."""

from bench_toys import make_row

from opensora_fast.benchmarks.summary import format_reasons, format_table


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
