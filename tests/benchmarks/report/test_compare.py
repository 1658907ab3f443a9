"""The regression gate: both thresholds, the same device only, the exit code."""

import math
from dataclasses import replace

import pytest
from bench_toys import make_row

from opensora_fast.benchmarks.measuring.refused import Refused
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.report.compare import Thresholds, compare
from opensora_fast.benchmarks.rows import append_rows, level_path
from opensora_fast.cli import run


def write(folder, *rows):
    for row in rows:
        append_rows(level_path(folder, row.level), [row])
    return folder


@pytest.fixture
def folders(tmp_path):
    return lambda before, after: (write(tmp_path / "a", *before), write(tmp_path / "b", *after))


@pytest.mark.parametrize(
    ("before_ms", "after_ms", "kind"),
    [
        (1.0, 1.04, None),  # under the relative threshold
        (1.0, 1.06, "slower"),
        (0.1, 0.109, None),  # 9 %, but under 0.01 ms
        (0.1, 0.111, "slower"),
        (1.0, 0.9, "faster"),
    ],
)
def test_both_thresholds_must_be_passed(folders, before_ms, after_ms, kind):
    comparison = compare(*folders([make_row(p50_ms=before_ms)], [make_row(p50_ms=after_ms)]))
    assert [item.kind for item in comparison.regressions] == ([kind] if kind == "slower" else [])
    assert [item.kind for item in comparison.improvements] == ([kind] if kind == "faster" else [])


def test_other_versions_are_told(folders):
    """A slower row may then be the fault of none of this project's changes."""
    commit, torch_and_driver = {"commit": "b" * 40}, {"torch": "2.13.0", "driver": ""}
    before = [make_row(), make_row(provider="eager"), make_row(provider="compile")]
    after = [make_row(**commit), make_row(provider="eager", **torch_and_driver)]
    paths = folders(before, after)
    assert compare(*paths).other_versions == ("driver 580.1 → none", "torch 2.11.0 → 2.13.0")
    assert "not the sources alone differ: driver 580.1 → none, torch" in str(compare(*paths))
    assert "not the sources alone" not in str(compare(paths[0], paths[0]))


def test_thresholds_can_be_chosen(folders):
    paths = folders([make_row(p50_ms=1.0)], [make_row(p50_ms=1.06)])
    assert not compare(*paths, Thresholds(relative=0.1)).regressions
    assert not compare(*paths, Thresholds(absolute_ms=0.1)).regressions
    for wrong in ({"relative": -0.1}, {"relative": math.nan}, {"absolute_ms": math.nan}):
        with pytest.raises(ValueError, match="each must be a number from 0 on"):
            Thresholds(**wrong)  # nothing is slower by more than nan


def test_memory_and_failures_are_regressions_and_absence_is_not(folders):
    before = [
        make_row(op="memory", memory_bytes=2**30),
        make_row(op="failure"),
        make_row(op="absence"),
        make_row(op="gone"),
        make_row(op="never").without_time("failed", "boom"),
    ]
    after = [
        make_row(op="memory", memory_bytes=2 * 2**30),
        make_row(op="failure").without_time("failed", "boom"),
        make_row(op="absence").without_time("unavailable", "not installed"),
        make_row(op="never"),
        make_row(op="new"),
    ]
    comparison = compare(*folders(before, after))
    assert {(item.before.op, item.kind) for item in comparison.regressions} == {
        ("memory", "more memory"),
        ("failure", "lost"),
    }
    assert (comparison.only_before, comparison.only_after) == (1, 1)


def test_a_result_that_is_wrong_now_is_a_regression(folders):
    """A refused provider has no row: `refused.jsonl` says so."""
    before, after = folders([make_row(op="wrong"), make_row(op="again")], [make_row(op="again"), make_row(op="other")])
    session = Session("cpu", after)
    late = replace(make_row().environment, date="2099-01-01T00:00:00Z")
    early = replace(late, date="1999-01-01T00:00:00Z")
    session.record([], [Refused(replace(make_row(op="wrong"), environment=late), "gradient of q", 0.3, 0.01)])
    session.record([], [Refused(replace(make_row(op="again"), environment=early), "output", 0.3, 0.01)])  # right since
    comparison = compare(before, after)
    assert [(item.before.op, item.kind) for item in comparison.regressions] == [("wrong", "lost")]
    assert "now failed: wrong, the error of its gradient of q is 0.3 of at most 0.01" in str(comparison)


def test_the_last_row_of_a_kind_counts(folders):
    paths = folders([make_row(p50_ms=1.0)], [make_row(p50_ms=9.0), make_row(p50_ms=1.0, commit="b" * 40)])
    assert not compare(*paths).regressions


def test_devices_are_never_mixed(folders):
    with pytest.raises(ValueError, match=r"nvidia-h200.*cpu-x86_64.*no row in common.*same device only"):
        compare(*folders([make_row(p50_ms=1.0)], [make_row(p50_ms=9.0, device_name="cpu-x86_64")]))


@pytest.mark.parametrize(("after_ms", "code"), [(1.0, 0), (2.0, 1)])
def test_the_exit_code_tells(folders, capsys, after_ms, code):
    before, after = folders([make_row(p50_ms=1.0)], [make_row(p50_ms=after_ms)])
    assert run(["bench", "--compare", str(before), str(after)]) == code
    output = capsys.readouterr().out
    assert "1 rows compared on nvidia-h200" in output
    assert ("1 → 2 ms (+100.0%)" in output) is (code == 1)


def test_missing_and_empty_folders_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["bench", "--compare", str(tmp_path / "empty"), str(tmp_path / "none")]) == 1
    assert "empty: holds no benchmark rows" in capsys.readouterr().err


def test_times_of_replays_and_of_single_calls_are_not_compared(folders):
    before = [make_row(p50_ms=2.0), make_row(op="memory", memory_bytes=2**30), make_row(op="same", timed="graph")]
    after = [
        make_row(p50_ms=1.0, timed="graph"),
        make_row(op="memory", memory_bytes=2**31, timed="graph"),
        make_row(op="same", p50_ms=2.0, timed="graph"),
    ]
    comparison = compare(*folders(before, after))
    assert not comparison.improvements
    assert {(item.before.op, item.kind) for item in comparison.regressions} == {
        ("memory", "more memory"),
        ("same", "slower"),
    }
    assert "times of 2 rows not compared" in str(comparison)
