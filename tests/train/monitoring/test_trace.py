"""A trace of some steps has their parts by name, and changes none of them; NVTX is told the same names."""

import gzip
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from joint_runs import assert_all_end_with
from losses import read_losses

from opensora_fast.train.loop import Trainer
from opensora_fast.train.monitoring import ranges
from opensora_fast.train.monitoring.ranges import named_range
from opensora_fast.train.monitoring.trace import StepTrace, parse_trace_steps

PARTS = ["wait for batch", "inputs", "forward", "backward", "wait for losses", "optimizer"]


def read_ranges(path):
    """(names of the ranges in the order in which they begin, names of the ops)"""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = sorted((event["ts"], event["name"]) for event in events if event.get("cat") == "user_annotation")
    return [name for _, name in found], {event["name"] for event in events if event.get("cat") == "cpu_op"}


def test_the_steps_are_traced_part_by_part_and_compute_the_same(train, tmp_path, whole):
    out = tmp_path / "run"
    code, _, error = train(out, "--steps", 5, "ckpt_every=3", "--trace-steps", "2:4")
    assert code == 0, error
    (path,) = (out / "traces").iterdir()
    assert path.name == "steps-2-4.json.gz" and f"trace: {path}; open it at https://ui.perfetto.dev" in error
    names, ops = read_ranges(path)
    assert names == ["step 2", *PARTS, "step 3", *PARTS, "copy for checkpoint", "step 4", *PARTS]
    assert "aten::addmm" in ops
    assert read_losses(out) == read_losses(whole)[:5]


def test_a_resumed_run_traces_what_is_left(train, tmp_path, whole):
    out = tmp_path / "run"
    assert train(out, "--steps", 2)[0] == 0
    assert train(out, "--steps", 4, "--resume", "auto", "--trace-steps", "1:3")[0] == 0
    (path,) = (out / "traces").iterdir()
    assert path.name == "steps-3.json.gz" and read_ranges(path)[0] == ["step 3", *PARTS]
    code, _, error = train(out, "--steps", 5, "--resume", "auto", "--trace-steps", "3:4")
    assert code == 0 and "note: no step was traced: the run has taken none of steps 3 to 4" in error
    assert read_losses(out) == read_losses(whole)[:5]


def test_a_step_that_no_batch_is_left_for_is_not_traced(train, tmp_path):
    """An epoch has 6."""
    code, _, error = train(tmp_path / "last", "epochs=1", "--trace-steps", "6:9")
    assert code == 0, error
    assert [path.name for path in (tmp_path / "last" / "traces").iterdir()] == ["steps-6.json.gz"]
    code, _, error = train(tmp_path / "none", "epochs=1", "--trace-steps", "7:9")
    assert code == 0 and "no step was traced: the run has taken none of steps 7 to 9" in error
    assert not (tmp_path / "none" / "traces").exists()


@pytest.mark.parametrize(
    ("happen", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 128 + signal.SIGTERM),
        (lambda: (_ for _ in ()).throw(ValueError("the data is gone")), 1),
    ],
    ids=["signal", "error"],
)
def test_a_run_that_stops_meanwhile_writes_what_was_traced(train, tmp_path, monkeypatch, happen, code):
    real = Trainer.compute_losses

    def compute_losses(self, batch, step):
        if step == 2:
            happen()
        return real(self, batch, step)

    monkeypatch.setattr(Trainer, "compute_losses", compute_losses)
    assert train(tmp_path / "run", "--steps", 5, "--trace-steps", "1:4")[0] == code
    assert read_ranges(tmp_path / "run" / "traces" / "steps-1-2.json.gz")[0][: len(PARTS) + 2] == [
        "step 1",
        *PARTS,
        "step 2",
    ]


def test_a_trace_that_cannot_be_written_stops_nothing(train, tmp_path, whole):
    out = tmp_path / "run"
    out.mkdir()
    (out / "traces").write_text("in its way")
    code, _, error = train(out, "--steps", 5, "--trace-steps", "2")
    assert code == 0 and "steps-2.json.gz could not be written: " in error
    assert read_losses(out) == read_losses(whole)[:5]


def test_nothing_is_left_of_a_trace_that_could_not_be_written_whole(tmp_path):
    told, one = [], SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"))
    in_its_way = tmp_path / "traces" / "steps-1.json.gz"
    in_its_way.mkdir(parents=True)
    with StepTrace((1, 1), tmp_path, one, told.append) as trace:
        trace.reach(1)
    assert list((tmp_path / "traces").iterdir()) == [in_its_way]
    assert len(told) == 1 and told[0].startswith(f"warning: the trace {in_its_way} could not be written: ")


def test_each_process_writes_its_trace_and_the_first_alone_the_events(train_together, tmp_path):
    out = tmp_path / "run"
    results = train_together(2, out, "--steps", 2, "--trace-steps", "2", "tensorboard=True")
    assert_all_end_with(results, 0)
    assert sorted(path.name for path in (out / "traces").iterdir()) == [
        "steps-2-rank-0.json.gz",
        "steps-2-rank-1.json.gz",
    ]
    for rank in range(2):
        names, _ = read_ranges(out / "traces" / f"steps-2-rank-{rank}.json.gz")
        assert [name for name in names if not name.startswith("gloo:")] == ["step 2", *PARTS]
    assert "steps-2-rank-0.json.gz, and one of each other process" in results[0]["error"]
    assert "trace" not in results[1]["error"]
    assert len(list((out / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(("text", "steps"), [("10:13", (10, 13)), ("7", (7, 7)), ("1:100", (1, 100))])
def test_steps_are_written_as_first_and_last(text, steps):
    assert parse_trace_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:3", "write the first and the last step, from 1 on, such as 10:13"),
        ("5:4", "write the first and the last step"),
        ("3:", "write the first and the last step"),
        ("-1:2", "write the first and the last step"),
        ("1:101", "a trace of 101 steps cannot be looked at; take at most 100"),
        ("4:5", "steps 4 to 5 would be traced, but the run ends with step 3"),
    ],
)
def test_other_steps_are_refused_before_anything_is_made(train, tmp_path, text, message):
    for dry in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 3, f"--trace-steps={text}", *dry)
        assert code == 1 and "error: --trace-steps" in error and message in error
        assert not (tmp_path / "run").exists()


@pytest.fixture
def nvtx(monkeypatch):
    """What NVTX is told, in place of torch's functions, of which torch for CPUs has none."""
    told = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append(f"begin {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    return told


def test_ranges_are_told_to_nvtx_on_a_gpu_only(nvtx):
    for kind in ("cpu", "cuda"):
        with named_range("step 1", torch.device(kind)):
            with pytest.raises(ValueError), named_range("forward", torch.device(kind)):
                raise ValueError
    assert nvtx == ["begin step 1", "begin forward", "end", "end"]


def test_torch_is_told_of_ranges_only_while_its_profiler_runs(monkeypatch):
    told = []
    real = ranges.record_function
    monkeypatch.setattr(ranges, "record_function", lambda name: told.append(name) or real(name))
    with named_range("alone", torch.device("cpu")):
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with named_range("watched", torch.device("cpu")):
            pass
    assert told == ["watched"] and [event.key for event in profile.key_averages()].count("watched") == 1
