"""Profiles of training steps: what they say is what ran."""

import csv
import gc
from types import SimpleNamespace

import pytest

from opensora_fast.benchmarks.profiles import step
from opensora_fast.benchmarks.profiles.step import (
    PROFILED,
    KernelTime,
    StepProfile,
    collect_kernels,
    format_profile,
    profile_steps,
    write_profile,
)
from opensora_fast.benchmarks.shapes import Workload
from opensora_fast.benchmarks.suites.scale import scale_of
from opensora_fast.cli import run


@pytest.fixture(scope="module")
def profile():
    scale = scale_of("cpu")
    return next(profile_steps([scale.headline[1]], "eager", scale))


def test_each_product_of_a_block_is_launched_once_in_each_layer_and_direction(profile):
    """[N, C] @ [C, 4 C]: the MLP's first layer forward, its second backward; [4 C, N] @ [N, C]: the weights of both."""
    config = scale_of("cpu").config
    tokens, width, hidden = profile.workload.tokens, config.hidden_size, 4 * config.hidden_size
    launches = {row.sizes: row.launches for row in profile.kernels if row.op == "aten::mm"}
    assert launches[f"{tokens}×{width} @ {width}×{hidden}"] == 2 * config.depth
    assert launches[f"{hidden}×{tokens} @ {tokens}×{width}"] == 2 * config.depth
    assert f"{width}×{tokens} @ {tokens}×{hidden}" not in launches


def test_longest_kernels_come_first_and_add_up_to_the_busy_time(profile):
    times = [row.microseconds for row in profile.kernels]
    assert times == sorted(times, reverse=True)
    assert profile.busy_milliseconds == pytest.approx(sum(times) / 1e3)
    assert 0.3 * profile.milliseconds < profile.busy_milliseconds < 5 * profile.milliseconds


def test_a_kernel_counts_once_where_the_queue_was_full():
    kernel = SimpleNamespace(name="nvjet_128x256", duration=30.0)
    events = [
        SimpleNamespace(name="aten::mm", input_shapes=[[2, 3], [3, 4]], kernels=[kernel]),
        SimpleNamespace(name="Command Buffer Full", input_shapes=[], kernels=[kernel]),
    ]
    expected = KernelTime("aten::mm", "nvjet_128x256", "2×3 @ 3×4", 1 / PROFILED, 30.0 / PROFILED)
    assert collect_kernels(events, "cuda") == (expected,)


def test_table_and_file_show_share_and_time_for_each_token(tmp_path):
    kernels = (
        KernelTime("aten::mm", "nvjet_128x256", "2×3 @ 3×4", 28.0, 3000.0),
        KernelTime("aten::copy_", "aten::copy_", "", 2.0, 1000.0),
    )
    profile = StepProfile(Workload("144p", 16, 1), "ours", 10.0, 0, kernels)
    assert profile.busy_milliseconds == 4.0
    head, first, second = format_profile(profile).splitlines()
    assert "ours, 2304 tokens: 10.00 ms a step, 230.4 k tokens/s, kernels 4.00 ms" in head
    assert first.split() == ["30.0", "%", "1302.1", "ns", "28.0", "×", "aten::mm", "nvjet_128x256", "2×3", "@", "3×4"]
    assert second.endswith("× aten::copy_")
    write_profile(profile, tmp_path / "step.csv")
    with (tmp_path / "step.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["kernel"] == "nvjet_128x256" and rows[0]["microseconds"] == "3000.0" and rows[0]["tokens"] == "2304"


def test_no_step_is_timed_with_what_the_profiler_left_of_another_workload(monkeypatch):
    """Python's collector would take most of a second for it, whenever it comes."""
    left = []
    monkeypatch.setattr(step, "_mean_milliseconds", lambda call, device: left.append(gc.collect()) or 1.0)
    gc.disable()
    try:
        scale = scale_of("cpu")
        list(profile_steps([scale.headline[1]] * 2, "eager", scale))
        left.append(gc.collect())
    finally:
        gc.enable()
    assert left[1] < left[2] / 10


def test_a_time_with_waits_for_memory_says_so():
    profile = StepProfile(Workload("144p", 16, 1), "ours", 10.0, 7, ())
    assert format_profile(profile).splitlines()[1].startswith("7 times in 10 steps torch found no room")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "faster"], "provider 'faster' is unknown"),
        (["--provider", "ours"], "provider ours does not run here: needs a CUDA GPU"),
        (["--resolutions", "1080p"], "--resolutions '1080p': choose among 144p, 240p"),
    ],
)
def test_what_cannot_be_profiled_is_said(arguments, message, tmp_path, capsys):
    assert run(["profile", "step", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_command_writes_a_file_for_each_resolution(tmp_path, capsys):
    arguments = ["--device", "cpu", "--provider", "eager", "--resolutions", "240p", "--out", str(tmp_path)]
    assert run(["profile", "step", *arguments]) == 0
    assert (tmp_path / "step_240p_eager.csv").is_file()
    assert "k tokens/s" in capsys.readouterr().out
