"""Clocks are read while a step runs, by a stand-in for nvidia-smi."""

import time

import pytest

from opensora_fast.benchmarks.environment import query_command
from opensora_fast.benchmarks.measuring import clocks
from opensora_fast.benchmarks.measuring.clocks import median_clocks, watch_clocks

# Once "1980, 3201"; asked again and again, the clocks fall under load. GPU 3 is idle.
SCRIPT = """#!/bin/sh
case "$*" in
*--id=3*loop-ms*) echo "600, 26"; exec sleep 60;;
*--id=3*) echo "600, 26";;
*loop-ms*) for clock in 1980 1500 1400 1400 1400; do echo "$clock, 3201"; done; exec sleep 60;;
*) echo "1980, 3201";;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-smi"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_median_while_it_runs(nvidia_smi):
    with watch_clocks("cuda", during=True) as found:
        time.sleep(1.0)
    assert found == ["1400", "3201"]


def test_one_reading_behind_a_short_measurement(nvidia_smi):
    with watch_clocks("cuda", during=False) as found:
        pass
    assert found == ["1980", "3201"]


@pytest.mark.parametrize("during", [False, True])
def test_the_clocks_are_those_of_the_gpu_that_is_used(nvidia_smi, monkeypatch, during):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with watch_clocks("cuda", during) as found:
        time.sleep(0.5 * during)
    assert found == ["600", "26"]


@pytest.mark.parametrize("visible", ["", "0", "GPU-a", "MIG-a"])
def test_names_of_gpus_are_passed_on_and_parts_of_one_are_not(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert query_command("name")[-1] == ("--id=GPU-a" if visible == "GPU-a" else "--id=0")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_where_nothing_answers(device, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with watch_clocks(device, during=True) as found:
        pass
    assert found == ["", ""]


def test_lines_that_are_no_clocks():
    assert median_clocks(["[N/A], [N/A]", "", "1200, 3201", "1300, 3201", "1100, 26"]) == ["1200", "3201"]
    assert median_clocks([""]) == ["", ""]


def test_an_error_passes_and_the_reader_ends(nvidia_smi, monkeypatch):
    processes = []
    start = clocks.subprocess.Popen
    monkeypatch.setattr(
        clocks.subprocess,
        "Popen",
        lambda *arguments, **options: processes.append(start(*arguments, **options)) or processes[-1],
    )
    with pytest.raises(RuntimeError, match="boom"), watch_clocks("cuda", during=True):
        raise RuntimeError("boom")
    assert processes[0].poll() is not None
