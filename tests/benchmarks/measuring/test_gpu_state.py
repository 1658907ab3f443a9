"""Clocks and power are read while something runs, by a stand-in for nvidia-smi."""

import time
from datetime import datetime

import pytest

from opensora_fast.benchmarks.environment import query_command
from opensora_fast.benchmarks.measuring import gpu_state
from opensora_fast.benchmarks.measuring.gpu_state import GpuState, Reading, Watched, parse_reading, watch_gpu

# Once "1980, 3201"; asked again and again, the clocks fall under load, and the power is told. GPU 3 is idle.
SCRIPT = """#!/bin/sh
now() { date "+%Y/%m/%d %H:%M:%S.%3N"; }
case "$*" in
*--id=3*loop-ms*) echo "$(now), 600, 26, 70.12"; exec sleep 60;;
*--id=3*) echo "600, 26";;
*loop-ms*) for clock in 1980 1500 1400 1400 1400; do echo "$(now), $clock, 3201, 688.40"; done; exec sleep 60;;
*) echo "1980, 3201";;
esac
"""
# Of a driver that has never heard of the power at an instant.
OLD_SCRIPT = """#!/bin/sh
case "$*" in
*power.draw.instant*) echo 'Field "power.draw.instant" is not a valid field to query.'; exit 2;;
*) echo "1980, 3201";;
esac
"""


def install(folder, monkeypatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, SCRIPT)


def watched_for(seconds: float, device: str = "cuda", readings: bool = True) -> GpuState:
    begin = time.time()
    with watch_gpu(device, readings) as watched:
        time.sleep(seconds)
    return watched.during([(begin, time.time())])


def test_medians_while_it_runs(nvidia_smi):
    assert watched_for(0.5) == GpuState("1400", "3201", "688")


def test_one_reading_behind_a_short_measurement_which_says_nothing_of_the_power(nvidia_smi):
    assert watched_for(0.0, readings=False) == GpuState("1980", "3201", "")


def test_readings_count_for_whose_turn_it_was():
    quick = [Reading(time, (1980.0, 3201.0, 300.0)) for time in (0.0, 1.0, 4.0)]
    heavy = [Reading(time, (1400.0, 3201.0, 698.0)) for time in (2.0, 3.0)]
    watched = Watched([*quick, *heavy], GpuState("1200", "3201"))
    assert watched.during([(-0.5, 1.5), (3.5, 4.5)]) == GpuState("1980", "3201", "300")
    assert watched.during([(1.5, 3.5)]) == GpuState("1400", "3201", "698")
    assert watched.during([(1.2, 1.8)]) == GpuState(), "nothing was read then; what others did says nothing"
    assert watched.during([]) == GpuState()


@pytest.mark.parametrize("readings", [False, True])
def test_they_are_those_of_the_gpu_that_is_used(nvidia_smi, monkeypatch, readings):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert watched_for(0.5 * readings, readings=readings) == GpuState("600", "26", "70" if readings else "")


@pytest.mark.parametrize("visible", ["", "0", "GPU-a", "MIG-a"])
def test_names_of_gpus_are_passed_on_and_parts_of_one_are_not(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert query_command("name")[-1] == ("--id=GPU-a" if visible == "GPU-a" else "--id=0")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_where_nothing_answers(device, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watched_for(0.0, device) == GpuState()


def test_an_old_driver_says_its_clocks_behind_it(monkeypatch, tmp_path):
    install(tmp_path, monkeypatch, OLD_SCRIPT)
    assert watched_for(0.2) == GpuState("1980", "3201", "")


def test_what_a_line_says():
    when = datetime(2026, 11, 28, 13, 45, 1, 123000).timestamp()
    assert parse_reading("2026/11/28 13:45:01.123, 1980, 3201, 687.15\n") == Reading(when, (1980.0, 3201.0, 687.15))
    assert parse_reading("2026/11/28 13:45:01.123, 1980, 3201, [N/A]\n") == Reading(when, (1980.0, 3201.0, None))


@pytest.mark.parametrize(
    "line", ["", "\n", "2026/11/28 13:45:01.123, 1980, 3201, 68", "2026/11/28 13:45:01.123, 1980\n", "No devices\n"]
)
def test_what_is_no_whole_line_says_nothing(line):
    assert parse_reading(line) is None


def test_an_error_passes_and_the_reader_ends(nvidia_smi, monkeypatch):
    processes = []
    start = gpu_state.subprocess.Popen
    monkeypatch.setattr(
        gpu_state.subprocess,
        "Popen",
        lambda *arguments, **options: processes.append(start(*arguments, **options)) or processes[-1],
    )
    with pytest.raises(RuntimeError, match="boom"), watch_gpu("cuda", readings=True):
        raise RuntimeError("boom")
    assert processes[0].poll() is not None
