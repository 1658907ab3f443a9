"""Workers that die, fall silent, lose the device or are interrupted: real processes, and every other row is there."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora_fast.benchmarks.measuring.timing import FEWEST_ROUNDS
from opensora_fast.benchmarks.processes import DONE, ERROR, INTERRUPTED, RESTART, WRONG, Plan
from opensora_fast.benchmarks.rows import read_folder
from opensora_fast.benchmarks.running import supervise as supervise_module
from opensora_fast.benchmarks.running.supervise import supervise

HERE = Path(__file__).parents[1]
WORKER = [sys.executable, str(HERE / "toy_worker.py")]

# A worker without torch: it appends its plan to a file and then does what STEPS says for that start.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
plan = json.loads(sys.argv[1])
folder = Path(plan["folder"])
with (folder / "plans.jsonl").open("a") as file:
    file.write(sys.argv[1] + "\\n")
start = len((folder / "plans.jsonl").read_text().splitlines())
def running(keys, stage):
    (folder / "running.json").write_text(json.dumps({"case": "a case", "keys": keys, "stage": stage}))
STEPS
"""


def stub(steps: str) -> list[str]:
    return [sys.executable, "-c", STUB.replace("STEPS", steps)]


def make_plan(folder: Path, **changes) -> Plan:
    return Plan(**{"suite": "all", "device": "cpu", "folder": str(folder), "started": "2000"} | changes)


def read_plans(folder: Path) -> list[Plan]:
    return [Plan.from_json(line) for line in (folder / "plans.jsonl").read_text().splitlines()]


def test_a_worker_ends_with_its_supervisor(tmp_path):
    """A supervisor that is killed cannot end it; left alone it would measure beside the next run."""
    script = (
        "import sys; from opensora_fast.benchmarks.processes import Plan; "
        "from opensora_fast.benchmarks.running.supervise import supervise; "
        "supervise(Plan.from_json(sys.argv[1]), command=sys.argv[2:])"
    )
    plan = make_plan(tmp_path).to_json()
    supervisor = subprocess.Popen([sys.executable, "-c", script, plan, *WORKER, "slow"])
    deadline = time.time() + 120
    while len(read_folder(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.1)
    supervisor.kill()
    supervisor.wait()
    time.sleep(1.0)
    rows = len(read_folder(tmp_path))
    time.sleep(2.0)  # three cases more, were it alive
    assert 2 <= len(read_folder(tmp_path)) == rows


@pytest.mark.parametrize("code", [DONE, ERROR, WRONG, INTERRUPTED])
def test_the_exit_code_of_a_worker_that_ends_by_itself_is_passed_on(tmp_path, code):
    assert supervise(make_plan(tmp_path), command=stub(f"sys.exit({code})")) == code
    assert len(read_plans(tmp_path)) == 1


def test_signals_act_as_before_when_the_worker_has_ended(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert supervise(make_plan(tmp_path), command=stub("")) == DONE
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_worker_that_asks_for_it_is_started_again(tmp_path):
    assert supervise(make_plan(tmp_path), command=stub(f"sys.exit({RESTART} if start < 3 else 0)")) == DONE
    assert len(read_plans(tmp_path)) == 3


def test_the_next_worker_is_told_what_the_dead_one_was_doing(tmp_path):
    steps = """
if start == 1:
    running([["a key"]], "check")
    os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert supervise(make_plan(tmp_path), command=stub(steps)) == DONE
    (death,) = read_plans(tmp_path)[1].deaths
    assert (death.case, death.keys) == ("a case", [["a key"]])
    assert death.reason == "its process was ended by SIGSEGV (check)"


@pytest.mark.parametrize(
    "then", [f"sys.exit({RESTART})", 'running([], "samples"); os.kill(os.getpid(), signal.SIGKILL)']
)
def test_a_death_is_told_once(tmp_path, then):
    steps = f"""
if start == 1:
    running([["a key"]], "check")
    os.kill(os.getpid(), signal.SIGSEGV)
if start == 2:
    {then}
"""
    assert supervise(make_plan(tmp_path), command=stub(steps)) == DONE
    assert [len(plan.deaths) for plan in read_plans(tmp_path)] == [0, 1, 0]


@pytest.mark.parametrize("code", [DONE, ERROR, WRONG, INTERRUPTED, 7])
def test_a_library_that_ends_the_process_does_not_end_the_run(tmp_path, code):
    """Whatever exit code it ends it with: what was running is not over."""
    steps = f"""
if start == 1:
    running([["a key"]], "check")
    os._exit({code})
"""
    assert supervise(make_plan(tmp_path), command=stub(steps)) == DONE
    (death,) = read_plans(tmp_path)[1].deaths
    assert (death.keys, death.reason) == ([["a key"]], f"it ended its process with exit code {code} (check)")


def test_where_nobody_can_tell_the_case_is_tried_carefully_and_then_given_up(tmp_path):
    steps = """
if start < 3:
    running([], "samples")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert supervise(make_plan(tmp_path), command=stub(steps)) == DONE
    plans = read_plans(tmp_path)
    assert plans[1].careful == ["a case"] and not plans[1].deaths
    assert [(death.case, death.keys) for death in plans[2].deaths] == [("a case", [])]


def test_a_worker_that_falls_silent_is_ended(tmp_path):
    steps = """
if start == 1:
    running([["a key"]], "check")
    time.sleep(600)
"""
    assert supervise(make_plan(tmp_path), stall_seconds=1.0, command=stub(steps)) == DONE
    assert read_plans(tmp_path)[1].deaths[0].reason == "it gave no sign of life for 1 s (check)"


def test_a_worker_may_load_for_longer_than_it_may_be_silent_later(tmp_path):
    steps = "time.sleep(1.5)\nrunning([], 'check')\n(folder / 'running.json').unlink()"
    assert supervise(make_plan(tmp_path), stall_seconds=0.5, command=stub(steps)) == DONE
    assert len(read_plans(tmp_path)) == 1


def test_a_worker_that_dies_at_once_is_not_started_for_ever(tmp_path):
    # left of a run that was ended from outside
    (tmp_path / "running.json").write_text(json.dumps({"case": "a case", "keys": [["a key"]], "stage": "check"}))
    assert supervise(make_plan(tmp_path), command=stub("os.kill(os.getpid(), signal.SIGKILL)")) == 128 + 9
    assert len(read_plans(tmp_path)) == 1


def test_a_worker_is_asked_at_the_deadline_and_given_time_to_end(tmp_path):
    steps = f"""
def stop(number, frame):
    time.sleep(0.5)
    (folder / "written").touch()
    sys.exit({INTERRUPTED})
signal.signal(signal.SIGTERM, stop)
time.sleep(600)
"""
    start = time.time()
    assert supervise(make_plan(tmp_path, deadline=start + 2), command=stub(steps)) == INTERRUPTED
    assert (tmp_path / "written").exists() and time.time() - start < supervise_module.GRACE_SECONDS


def test_a_worker_that_does_not_stop_when_asked_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise_module, "GRACE_SECONDS", 0.5)
    steps = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    start = time.time()
    assert supervise(make_plan(tmp_path, deadline=start + 0.5), command=stub(steps)) == INTERRUPTED
    assert time.time() - start < 20


@pytest.mark.parametrize(
    "steps",
    [
        "time.sleep(600)",  # it is still loading
        f"signal.signal(signal.SIGTERM, lambda number, frame: sys.exit({RESTART}))\ntime.sleep(600)",
        # It hangs, in whatever it was doing.
        'running([["a key"]], "check")\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)',
    ],
    ids=["while loading", "while asking for another", "while hanging"],
)
def test_who_presses_ctrl_c_stops_the_run(tmp_path, steps):
    """Whatever the worker is doing; as in a terminal, both processes receive the signal."""
    worker = stub("print('started', flush=True)\n" + steps)
    script = f"""
import sys
from opensora_fast.benchmarks.processes import Plan
from opensora_fast.benchmarks.running import supervise
supervise.GRACE_SECONDS = 0.5
sys.exit(supervise.supervise(Plan.from_json(sys.argv[1]), command={worker!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, make_plan(tmp_path).to_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and errors == ""
    assert len(read_plans(tmp_path)) == 1  # no other worker was started


def start_worker(folder, cases):
    """A supervisor in a process of its own, over the real worker."""
    code = f"""
import sys
from opensora_fast.benchmarks.processes import Plan
from opensora_fast.benchmarks.running.supervise import supervise
sys.exit(supervise(Plan.from_json(sys.argv[1]), command={[*WORKER, cases]!r}))
"""
    command = [sys.executable, "-c", code, make_plan(folder).to_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory):
    """(folder, output) of a run in which one provider loses the device, some end the process, and one is wrong."""
    folder = tmp_path_factory.mktemp("evil")
    process = start_worker(folder, "evil")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == WRONG
    return folder, output


def test_providers_that_take_the_process_down_cost_their_own_rows(evil_run):
    folder, output = evil_run
    rows = read_folder(folder)
    assert len({row.key for row in rows}) == len(rows)  # nothing was measured twice
    assert {row.provider for row in rows if row.status == "ok"} == {"eager", "other"}
    assert len([row for row in rows if row.status == "ok"]) == 2 * (1 + 2 + 2 + 1)  # directions of four cases
    failed = {(row.provider, row.direction): row.reason for row in rows if row.status == "failed"}
    assert failed == {
        ("crash", "forward"): "CUDA error",
        ("crash", "forward+backward"): "CUDA error",
        ("kill", "forward"): "its process was ended by SIGKILL (check)",
        ("kill", "forward+backward"): "its process was ended by SIGKILL (check)",
        ("leave", "forward"): "it ended its process with exit code 0 (check)",
        ("leave", "forward+backward"): "it ended its process with exit code 0 (check)",
        ("kill-by-import", "forward"): "its process was ended by SIGKILL (preparation)",
        ("kill-by-import", "forward+backward"): "its process was ended by SIGKILL (preparation)",
    }
    assert not (folder / "running.json").exists()
    refused = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
    assert {item["name"] for item in refused} == {
        "op toy forward size 64 ours",
        "op toy forward+backward size 64 ours",
    }
    assert "wrong, so no time: op toy forward size 64 ours" in output


def test_a_provider_that_takes_a_refreshing_run_down_is_not_tried_for_ever(evil_run, tmp_path):
    """Beside its row of before, too."""
    shutil.copytree(evil_run[0], tmp_path, dirs_exist_ok=True)
    before = read_folder(tmp_path)
    time.sleep(1.1)  # dates are in seconds
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert supervise(make_plan(tmp_path, refresh=True, started=started), command=[*WORKER, "evil"]) == WRONG
    again = read_folder(tmp_path)[len(before) :]
    failed = {(row.provider, row.direction, row.reason) for row in before if row.status == "failed"}
    assert len(failed) == 8 == len([row for row in again if row.status == "failed"])
    assert {(row.provider, row.direction, row.reason) for row in again if row.status == "failed"} == failed


def test_a_case_that_is_stopped_writes_what_it_has_measured(tmp_path):
    """While forward is sampled: that has its times, backward has not begun, and the next run measures only that."""
    process = start_worker(tmp_path, "long")
    deadline, state = time.time() + 100, ""
    while "samples" not in state and time.time() < deadline:
        time.sleep(0.1)
        state = (tmp_path / "running.json").read_text() if (tmp_path / "running.json").exists() else ""
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and f"rows: {tmp_path}" in output
    rows = {(row.provider, row.direction): row for row in read_folder(tmp_path)}
    assert {key: row.status for key, row in rows.items()} == {
        ("absent", "forward"): "unavailable",
        ("absent", "forward+backward"): "unavailable",
        ("eager", "forward"): "ok",
        ("other", "forward"): "ok",
    }
    assert all(row.samples >= FEWEST_ROUNDS and row.p50_ms > 0 for row in rows.values() if row.status == "ok")


def test_an_interrupted_run_keeps_its_rows_and_goes_on_later(tmp_path):
    process = start_worker(tmp_path, "slow")
    deadline = time.time() + 100
    while len(read_folder(tmp_path)) < 4 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    rows = read_folder(tmp_path)
    assert 4 <= len(rows) < 200 and {row.status for row in rows} == {"ok"}
    assert "forward+backward" in output and f"rows: {tmp_path}" in output  # the table of what there is

    for budget in (8, 16, 32, 64):  # ends in the middle as well, by its budget; a busy machine takes long to start
        if len(read_folder(tmp_path)) > len(rows):
            break
        plan = make_plan(tmp_path, deadline=time.time() + budget)
        assert supervise(plan, command=[*WORKER, "slow"]) in (DONE, INTERRUPTED)
    after = read_folder(tmp_path)
    assert len(after) == len({row.key for row in after}) > len(rows)
    kept = {row.key: row.p50_ms for row in after}
    assert all(kept[row.key] == row.p50_ms for row in rows)


def test_plans_come_back_as_they_were(tmp_path):
    plan = make_plan(tmp_path, providers=["ours"], words=["240p"], deadline=1.5, careful=["x"])
    assert Plan.from_json(plan.to_json()) == plan
