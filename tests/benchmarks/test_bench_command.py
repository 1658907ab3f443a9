"""`opensora-fast bench` and `opensora-fast profile` as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opensora_fast.benchmarks.processes import DONE
from opensora_fast.benchmarks.rows import read_folder
from opensora_fast.cli import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "a", "b", "--report", "c"], "--compare and --report each do one thing"),
        (["--report", "a", "--out", "x"], "name their folders themselves; leave out --out, --device"),
        (["--compare", "a", "b", "--only", "spatial"], "measure nothing and name their folders themselves; leave out"),
        (["--report", "a", "--suite", "push"], "name their folders themselves; leave out --suite, --device"),
        (["--out", "x", "--relative", "0.1"], "only --compare takes --relative: add it, or leave that out"),
        (["--out", "x", "--suite", "everything"], "suite 'everything' is unknown; choose one of all, push, kernels"),
        (["--out", "x", "--providers", "flash-attn-9"], "provider 'flash-attn-9' is unknown in this suite"),
        (["--out", "x", "--providers", ""], "--providers '': write names with commas between them, or leave"),
        (["--out", "x", "--providers", "eager,,ours"], "--providers 'eager,,ours': write names with commas"),
        (["--out", "x", "--only", ""], "--only '': give words of the cases, or leave the option out"),
        (["--out", "x", "--only", "spatial", "999p"], "no case of suite all on cpu has the words spatial, 999p"),
        (["--out", "x", "--budget", "soon"], "--budget 'soon': write a time such as 9m"),
        (["--out", "x", "--commit", "main"], "--commit main: "),
        ([], "--out is missing: give a folder for the rows"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "--device", "cpu", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", [["bench"], ["profile", "attention"], ["profile", "step"], ["demo"]], ids=" ".join)
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "torch finds no GPU; `opensora-fast doctor` says why"), ("tpu", "choose cpu or cuda")],
)
def test_a_device_that_is_not_here_is_refused_as_in_training(tmp_path, monkeypatch, capsys, command, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([*command, "--device", device, "--out", str(tmp_path / "rows")]) == 1
    assert f"--device {device}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("command", [["bench", "--list"], ["train", "demo", "--dry-run"]], ids=" ".join)
def test_what_is_only_planned_may_be_for_a_device_that_is_not_here_but_must_be_one(monkeypatch, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([*command, "--device", "cuda"]) == 0
    assert run([*command, "--device", "tpu"]) == 1
    assert "--device tpu: choose cpu or cuda" in capsys.readouterr().err


def test_the_plan_can_be_read_without_measuring(capsys):
    assert run(["bench", "--device", "cpu", "--suite", "kernels", "--only", "spatial 240p", "--list"]) == 0
    output = capsys.readouterr().out
    assert "op spatial_attention 240p×1  [B=1 T=1 S=405 H=2 D=72]  upstream, eager," in output
    assert output.splitlines()[-1].endswith("rows")


def test_the_plan_for_another_gpu_can_be_read_anywhere(capsys):
    assert run(["bench", "--suite", "push", "--only", "step 720p", "--list", "--gpu", "H100"]) == 0
    assert "upstream-flash, compile-recompute-three-quarters, ours-recompute-half" in capsys.readouterr().out
    for words, message in (
        (["--list", "--device", "cpu"], "--gpu plans for a GPU, and --device is cpu"),
        (["--out", "rows"], "--gpu is what --list plans for"),
    ):
        assert run(["bench", "--suite", "push", "--gpu", "H100", *words]) == 1
        assert message in capsys.readouterr().err


def test_one_row_can_be_run_stopped_and_run_again(tmp_path, monkeypatch, capfd):
    """A real process: rows are there after Ctrl-C, and the second run measures only what is missing."""
    out = tmp_path / "rows"
    words = ["bench", "--device", "cpu", "--suite", "kernels", "--providers", "eager,upstream", "--out", str(out)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    command = [sys.executable, "-m", "opensora_fast", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while len(read_folder(out)) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    rows = read_folder(out)
    assert len(rows) >= 3 and f"rows: {out}" in output and "Traceback" not in errors
    assert "opensora-fast: error: stopped; run again with the same --out to go on\n" in errors

    assert run([*words, "--only", "spatial_attention", "240p×1"]) == 0
    output = capfd.readouterr().out
    assert "spatial_attention" in output and f"rows: {out}" in output
    after = read_folder(out)
    assert {row.key for row in rows} < {row.key for row in after}
    assert len({row.key for row in after}) == len(after)
    attention = [row for row in after if row.op == "spatial_attention" and row.workload == "240p×1"]
    assert {row.provider for row in attention} == {"eager", "upstream"}
    assert all(row.environment.commit and row.environment.date for row in after)


@pytest.mark.parametrize(
    ("state", "note"),
    [
        (("a" * 40, False), ""),
        (("a" * 40, True), "note: the sources differ from commit aaaaaaaaaaaa; every row says so"),
        (("", False), "note: the sources are of a commit that nobody knows; --commit names it; every row says so"),
    ],
)
def test_sources_that_cannot_be_told_are_named_before_anything_is_measured(tmp_path, monkeypatch, capsys, state, note):
    monkeypatch.setattr("opensora_fast.benchmarks.environment.find_source_state", lambda commit: state)
    monkeypatch.setattr("opensora_fast.benchmarks.running.supervise.supervise", lambda plan: DONE)
    assert run(["bench", "--device", "cpu", "--out", str(tmp_path)]) == DONE
    output = capsys.readouterr().out
    assert note in output and ("note:" in output) == bool(note)


def test_a_table_that_the_terminal_cannot_show_is_escaped(tmp_path):
    """The process that measures prints it, at the end of a run."""
    words = ["--device", "cpu", "--suite", "kernels", "--only", "copy", "--out", tmp_path / "d\u00e9mo"]
    process = subprocess.run(
        [sys.executable, "-m", "opensora_fast", "bench", *words],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == DONE, process.stderr
    assert f"rows: {tmp_path}/d\\xe9mo" in process.stdout.splitlines()


def test_a_budget_that_is_over_before_anything_begins_is_told(tmp_path, capsys):
    assert run(["bench", "--device", "cpu", "--suite", "kernels", "--budget", "0.1s", "--out", str(tmp_path)]) == 130
    assert "--budget was over while the process that measures was loading" in capsys.readouterr().err


def test_a_folder_that_another_run_writes_into_is_refused(tmp_path, capsys):
    """Each would measure every row again, beside the other, and disturb its times."""
    code = "import sys, pathlib; from opensora_fast.folder_lock import hold_folder\n"
    code += f"with hold_folder(pathlib.Path({str(tmp_path)!r}), print): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        words = ["--suite", "kernels", "--providers", "eager", "--only", "gelu_tanh 240p", "--budget", "1s"]
        assert run(["bench", "--device", "cpu", "--out", str(tmp_path), *words]) == 1
        other.kill()
    assert f"another run is writing into {tmp_path} (process {other.pid} on " in capsys.readouterr().err
    assert read_folder(tmp_path) == []


def test_profile_attention(tmp_path, capsys):
    arguments = [
        "profile",
        "attention",
        "--device",
        "cpu",
        "--seqlens",
        "8,16,8",
        "--providers",
        "upstream, eager,ours",
    ]
    assert run([*arguments, "--budget", "0.2", "--out", str(tmp_path), "--trace"]) == 0
    output = capsys.readouterr().out
    assert output.count("forward+backward     eager") == 2
    assert "share of limit" in output and "ours: unavailable (4 rows): needs a CUDA GPU" in output
    files = {path.name for path in tmp_path.iterdir()}
    assert {"attention_spatial.csv", "attention_spatial.svg"} <= files
    assert {"trace_spatial_16_upstream.json", "trace_spatial_16_eager.json"} <= files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "diagonal"], "attention kind 'diagonal' is unknown; choose one of spatial, temporal, cross"),
        (["--seqlens", "0"], "each must be at least 1"),
        (["--seqlens", "many"], "--seqlens 'many': write whole numbers"),
        (["--seqlens", ""], "--seqlens '': write whole numbers"),
        (["--budget", "0"], "--budget '0': write a time such as 9m"),
        (["--providers", "flash-attn-9"], "provider 'flash-attn-9' is unknown; known: upstream, eager"),
        (["--providers", ""], "--providers '': write names with commas between them, or leave the option out"),
    ],
)
def test_mistakes_in_profiles(tmp_path, capsys, arguments, message):
    assert run(["profile", "attention", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_pytest_saves_and_compares(tmp_path):
    """`pytest benchmarks` as the users of pytest-benchmark know it."""
    arguments = [
        "benchmarks/test_ops.py",
        "-k",
        "gelu_tanh and forward- and (eager or compile)",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    arguments += ["--benchmark-max-time=0.05", f"--benchmark-storage={tmp_path}"]
    save = [*arguments, "--benchmark-save=first"]
    compare = [*arguments, "--benchmark-compare=0001", "--benchmark-compare-fail=min:100000%"]
    # One process for both, as importing takes longer than either.
    code = f"import pytest; assert [pytest.main({save!r}), print('compared'), pytest.main({compare!r})] == [0, None, 0]"
    # Told by its environment that it is a worker of pytest-xdist, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    saved, compared = process.stdout.split("compared\n")
    assert "1 passed, 1 skipped" in saved and "torch.compile is measured on CUDA only" in saved
    (path,) = tmp_path.rglob("*_first.json")
    (row,) = json.loads(path.read_text())["benchmarks"]
    assert row["extra_info"]["provider"] == "eager"
    assert row["extra_info"]["error"] <= row["extra_info"]["error_limit"]
    assert "1 passed, 1 skipped" in compared and "0001_first" in compared
