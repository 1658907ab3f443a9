"""The tuner's choice among candidates, with the clock replaced: it measures on a GPU only."""

import csv
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from opensora_fast.cli import kernels as cli
from opensora_fast.kernels import autotune
from opensora_fast.kernels.autotune import TUNED_OPS, Timing, Workload, choose_fastest, make_workload, measure_workload
from opensora_fast.kernels.compilation import modules_with
from opensora_fast.kernels.configurations import Configuration, read_measured
from opensora_fast.kernels.rows import gelu_tanh, residual_norm_tiles

FIRST, SECOND = Configuration(BLOCK=1), Configuration(BLOCK=2)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "CHANNELS", 8)


@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual", "gate_residual_modulated_norm", "gelu_tanh"])
def test_every_candidate_of_every_kernel_runs_and_agrees(op, device) -> None:
    workload = make_workload(op, "tiny", [(2, 1, 3), (1, 1, 2)], device, torch.float32)
    ticks = count()
    timings = measure_workload(workload, time=lambda run: float(next(ticks)))
    kernels = {f"{op}_forward", f"{op}_backward"}
    assert {timing.kernel for timing in timings} == kernels
    table = residual_norm_tiles.CONFIGURATIONS | gelu_tanh.CONFIGURATIONS
    for kernel in kernels:
        tried = [timing.configuration for timing in timings if timing.kernel == kernel]
        assert tried == list(table[kernel]["any"])


def test_what_has_a_choice_has_a_workload() -> None:
    tables = {name: table for module in modules_with("CONFIGURATIONS") for name, table in module.CONFIGURATIONS.items()}
    chosen = [name for name, table in tables.items() if any(len(candidates) > 1 for candidates in table.values())]
    assert [name for name in chosen if not name.startswith(TUNED_OPS)] == []


@pytest.mark.parametrize("op", ["spatial_attention", "temporal_attention", "cross_attention"])
def test_attention_finds_the_gradient_of_a_bias_as_in_training(op, device, monkeypatch) -> None:
    monkeypatch.setattr(autotune, "HEADS", 1)
    monkeypatch.setattr(autotune, "HEAD_SIZE", 24)
    workload = make_workload(op, "tiny", [(2, 1, 3), (1, 1, 2)], device, torch.float32)
    *_, bias = workload.inputs
    *_, gradient = workload.prepare_backward()()
    assert gradient.shape == bias.shape == ((1, 24) if op == "cross_attention" else (3, 1, 24))
    assert gradient.abs().max() > 0


def timing(configuration: Configuration, microseconds: float | None, pack: str = "a") -> Timing:
    return Timing("op", pack, "op_forward", "any", configuration, microseconds)


def test_the_least_total_time_wins() -> None:
    rows = choose_fastest([timing(FIRST, 3), timing(SECOND, 4), timing(FIRST, 9, "b"), timing(SECOND, 1, "b")])
    assert rows == [
        {
            "kernel": "op_forward",
            "shape_class": "any",
            "configuration": SECOND.choices,
            "microseconds": 5,
            "default_microseconds": 12,
            "workloads": 2,
        }
    ]


def test_a_candidate_that_does_not_run_everywhere_loses() -> None:
    rows = choose_fastest([timing(FIRST, 1), timing(SECOND, 4), timing(FIRST, None, "b"), timing(SECOND, 4, "b")])
    assert rows[0]["configuration"] == SECOND.choices and rows[0]["default_microseconds"] is None
    assert choose_fastest([timing(FIRST, None)]) == []


def test_candidates_with_wrong_results_lose_and_say_so(device) -> None:
    right = make_workload("gelu_tanh", "tiny", [(1, 1, 2)], device, torch.float32)
    calls = count()
    wrong = Workload("gelu_tanh", "tiny", right.inputs, lambda *inputs: right.call(*inputs) + next(calls))
    timings = measure_workload(wrong, time=lambda run: 1.0)
    forward = [timing for timing in timings if timing.kernel == "gelu_tanh_forward"]
    assert {timing.microseconds for timing in forward} == {None}
    assert all("differ" in timing.reason for timing in forward)
    assert [row["kernel"] for row in choose_fastest(timings)] == ["gelu_tanh_backward"]


def test_a_candidate_that_fails_costs_itself(device) -> None:
    workload = make_workload("gelu_tanh", "tiny", [(1, 1, 2)], device, torch.float32)
    ticks = count()

    def time(run) -> float:
        if next(ticks) == 1:
            raise RuntimeError("PTXAS error:\nno such instruction")
        return 1.0

    first, second, *others = measure_workload(workload, time)
    assert (second.microseconds, second.reason) == (None, "RuntimeError: no such instruction")
    assert all(timing.microseconds == 1.0 and not timing.reason for timing in [first, *others])


def test_a_present_choice_that_fails_costs_its_own_pass(device, monkeypatch) -> None:
    """The other pass is measured, and so are other workloads."""
    workload = make_workload("gelu_tanh", "tiny", [(1, 1, 2)], device, torch.float32)

    prepare_backward = Workload.prepare_backward

    def prepare_one_that_fails(self):
        run = prepare_backward(self)

        def fail():
            run()
            raise RuntimeError("out of shared memory")

        return fail

    monkeypatch.setattr(Workload, "prepare_backward", prepare_one_that_fails)
    timings = measure_workload(workload, time=lambda run: 1.0)
    failed = [timing for timing in timings if timing.kernel == "gelu_tanh_backward"]
    reason = "not measured, as the present choice fails: RuntimeError: out of shared memory"
    assert {(timing.microseconds, timing.reason) for timing in failed} == {(None, reason)}
    assert all(timing.microseconds == 1.0 for timing in timings if timing not in failed)
    assert [row["kernel"] for row in choose_fastest(timings)] == ["gelu_tanh_forward"]


def test_a_lost_gpu_ends_the_measurement_after_its_workload(monkeypatch) -> None:
    lost = replace(timing(FIRST, None), reason="AcceleratorError: illegal instruction")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(autotune, "make_workload", lambda *arguments: None)
    monkeypatch.setattr(autotune, "measure_workload", lambda workload: [lost])
    monkeypatch.setattr(autotune, "gpu_works", lambda: False)
    monkeypatch.setattr(autotune, "own_stream", lambda device: nullcontext())
    _, measured = autotune.tune(["gelu_tanh"], torch.device("cuda"))
    assert next(measured) == [lost]
    with pytest.raises(ValueError, match="the GPU cannot be used any more, likely since .*illegal instruction"):
        next(measured)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "gpu.json"
    autotune.write_measured([timing(FIRST, 1.0)], "NVIDIA Test 1", {}, path)
    before = path.read_text()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune.os, "replace", stop)
    for write in (
        lambda: autotune.write_measured([timing(SECOND, 1.0)], "NVIDIA Test 1", {}, path),
        lambda: autotune.write_timings([timing(FIRST, 1.0)], path),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
        assert path.read_text() == before
    read_measured.cache_clear()


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, monkeypatch) -> None:
    """It would show after the first workload, at the earliest."""
    about = SimpleNamespace(torch="2", triton="3", commit="0", date="")
    monkeypatch.setattr("opensora_fast.benchmarks.environment.describe_environment", lambda device: about)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(autotune, "make_workload", lambda *arguments: pytest.fail("something was measured"))
    place, fine = tmp_path / "file", tmp_path / "new" / "fine"
    place.write_text("")
    for out, timings in ((place / "gpu.json", fine), (fine, place / "candidates.csv")):
        with pytest.raises(OSError, match="file"):
            cli.autotune(out=out, op=["gelu_tanh"], budget=None, timings=timings)
    read_measured.cache_clear()


def test_every_timing_is_written(tmp_path) -> None:
    path = tmp_path / "new" / "candidates.csv"
    autotune.write_timings([timing(FIRST, 3.5), replace(timing(SECOND, None), reason="too large")], path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["configuration"], row["microseconds"], row["reason"]) for row in rows] == [
        (str(FIRST), "3.5", ""),
        (str(SECOND), "", "too large"),
    ]


def test_nothing_is_begun_after_the_deadline(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(autotune.clock, "time", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(autotune, "gpu_works", lambda: True)
    monkeypatch.setattr(autotune, "own_stream", lambda device: nullcontext())
    monkeypatch.setattr(autotune, "make_workload", lambda op, pack, *others: (op, pack))

    def measure(workload):
        now[0] += 1.0
        return [workload]

    monkeypatch.setattr(autotune, "measure_workload", measure)
    total, measured = autotune.tune(["gelu_tanh"], torch.device("cuda"), deadline=102.5)
    assert total == len(autotune.PACKS)
    assert len(list(measured)) == 3  # begun at 100, 101 and 102


def test_the_file_keeps_the_rows_of_other_kernels_and_when_they_were_measured(tmp_path) -> None:
    path = tmp_path / "gpu.json"
    for commit, (kernel, configuration) in enumerate((("a", FIRST), ("b", FIRST), ("a", SECOND))):
        measured = replace(timing(configuration, 1.0), kernel=kernel)
        autotune.write_measured([measured], "NVIDIA Test 1", {"triton": "3", "commit": str(commit)}, path)
    written = json.loads(path.read_text())
    assert written["gpu"] == "NVIDIA Test 1"
    assert [(row["kernel"], row["configuration"], row["triton"], row["commit"]) for row in written["rows"]] == [
        ("a", SECOND.choices, "3", "2"),
        ("b", FIRST.choices, "3", "1"),
    ]
    read_measured.cache_clear()


def test_a_run_cut_short_keeps_what_was_measured_over_more_workloads(tmp_path) -> None:
    path = tmp_path / "gpu.json"

    def write(*packs: str, fastest: Configuration, candidates=(FIRST, SECOND)) -> list[dict]:
        times = [timing(one, 1.0 if one == fastest else 2.0, pack) for pack in packs for one in candidates]
        return autotune.write_measured(times, "NVIDIA Test 1", {"commit": "".join(packs)}, path)[1]

    def written() -> tuple[dict, int, str]:
        (row,) = json.loads(path.read_text())["rows"]
        return row["configuration"], row["workloads"], row["commit"]

    assert write("a", "b", fastest=FIRST) == []
    (stays,) = write("a", fastest=SECOND)
    assert (stays["configuration"], stays["workloads"]) == (FIRST.choices, 2)
    assert written() == (FIRST.choices, 2, "ab")
    assert write("c", "d", fastest=SECOND) == []
    assert written() == (SECOND.choices, 2, "cd")
    other = Configuration(BLOCK=3)
    assert write("a", fastest=other, candidates=(FIRST, other)) == []  # SECOND is no candidate any more
    assert written() == (other.choices, 1, "a")
    read_measured.cache_clear()


def test_the_command_says_what_it_did_not_write(tmp_path, monkeypatch, capsys) -> None:
    about = SimpleNamespace(torch="2", triton="3", commit="0", date="")
    monkeypatch.setattr("opensora_fast.benchmarks.environment.describe_environment", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    out = tmp_path / "gpu.json"
    runs = iter([["a", "b"], ["c"]])
    monkeypatch.setattr(
        autotune, "tune", lambda ops, device, deadline: (2, iter([[timing(FIRST, 3.0, pack)] for pack in next(runs)]))
    )
    cli.autotune(out=out, op=["gelu_tanh"], budget=None, timings=None)
    assert "not written" not in capsys.readouterr().out
    cli.autotune(out=out, op=["gelu_tanh"], budget=None, timings=None)
    assert "op_forward / any: BLOCK=1 num_warps=4 num_stages=2  (1.00 x the default; not written: on 1 workloads, " in (
        capsys.readouterr().out
    )
    read_measured.cache_clear()


def test_a_candidate_that_hangs_ends_the_process_and_is_named() -> None:
    script = (
        "import time; from opensora_fast.kernels.autotune import end_if_hanging\n"
        "with end_if_hanging('quick', 60.0): pass\n"
        "with end_if_hanging('BLOCK=2 of a / any', 0.1): time.sleep(60.0)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert process.returncode == 1
    assert "BLOCK=2 of a / any: not over after 0.1 s, so it hangs" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match="--op patchify: nothing to tune"):
        autotune.tune(["patchify"], torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="autotune measures on a CUDA GPU"):
        autotune.tune(["gelu_tanh"], torch.device("cuda"))
