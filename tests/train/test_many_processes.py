"""Several processes train one model: the steps of one process on all their micro-batches, stopped and resumed exactly,
and they all stop where one has to."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from joint_runs import LOST, assert_all_end_with, checkpoint_of
from losses import read_losses
from one_process import OneProcess
from safetensors.torch import load_file
from same_checkpoints import assert_same_weights
from torch.distributed.run import get_args_parser

from opensora_fast.config import load_train_config
from opensora_fast.data.bad_clips import read_bad_clips
from opensora_fast.parallel.processes import Processes
from opensora_fast.train import train as training
from opensora_fast.train.checkpoints.checkpoint import find_newest
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.monitoring.metrics import read_metrics
from opensora_fast.train.train import choose_cpu_threads, describe_replay

STEPS = 4
DTYPES = {2: "dtype=fp32", 3: "dtype=bf16"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder_of_wholes(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(train_together, folder_of_wholes):
    """whole(world_size): a run that was never stopped; made once, and only read by the tests. That of 3 in bfloat16."""

    def get(world_size):
        out = folder_of_wholes / str(world_size)
        if not out.exists():
            assert_all_end_with(
                train_together(world_size, out, "--steps", STEPS, "ckpt_every=2", DTYPES[world_size]), 0
            )
        return out

    return get


@pytest.mark.parametrize(
    ("world_size", "dtype", "steps", "tolerance"),
    # In bfloat16 gradients are rounded when they are added. A second step is not compared: AdamW's first one is the
    # sign of the gradient, whatever its size, and so of the rounding where the gradient is nearly zero.
    [(3, "fp32", 2, 1e-6), (2, "bf16", 1, 2**-7)],
)
def test_steps_are_those_of_one_process_on_the_mean_gradient(
    train_together, config, table, tmp_path, world_size, dtype, steps, tolerance
):
    out = tmp_path / "run"
    more = [f"dtype={dtype}", "grad_clip=0.25"]
    assert_all_end_with(train_together(world_size, out, "--steps", steps, *more), 0)
    loaded = load_train_config(config, more, {"dataset.data_path": str(table)}).config
    with ExitStack() as stack:
        one = OneProcess(loaded, world_size, out, stack)
        rows = read_metrics(out / "metrics.jsonl")
        for number, row in enumerate(rows, start=1):
            loss, norm = one.step(number)
            assert row["loss"] == pytest.approx(loss, rel=tolerance)
            assert row["grad_norm"] == pytest.approx(norm, rel=tolerance) and norm > loaded.grad_clip
    assert len(rows) == steps
    stored = {name: load_file(checkpoint_of(out, steps) / name / "model.safetensors") for name in ("model", "ema")}
    moments = load_file(checkpoint_of(out, steps) / "optimizer.safetensors")
    wrong = []
    for name, weight in one.weights.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            expected = one.optimizer.state[weight][kind]
            assert (moments[f"{kind}.{name}"] - expected).norm() <= 2 * tolerance * expected.norm(), (kind, name)
        for kind, expected in (("model", weight), ("ema", one.average[name])):
            wrong.append(((stored[kind][name] - expected).abs() > 1e-3 * loaded.lr).flatten())
    assert torch.cat(wrong).float().mean() <= (0 if dtype == "fp32" else 0.005)


@pytest.mark.parametrize("world_size", [2, 3])
def test_stop_and_resume_is_exact(train_together, whole, tmp_path, world_size):
    expected = whole(world_size)
    out = tmp_path / "run"
    for steps in (1, STEPS):  # the second epoch begins with step 3 of 3 processes, step 4 of 2
        results = train_together(world_size, out, "--steps", steps, "--resume", "auto", DTYPES[world_size])
        assert_all_end_with(results, 0)
    assert "after step 1" in results[0]["out"] and not any(result["out"] for result in results[1:])
    assert len(read_losses(out)) == STEPS
    assert read_losses(out) == read_losses(expected)
    assert_same_weights(checkpoint_of(out, STEPS), checkpoint_of(expected, STEPS))


@pytest.fixture(scope="module")
def told_order():
    """Set by the test that runs, so that both look at one run."""
    return []


@pytest.fixture
def told(train_together, tmp_path, told_order):
    """told[rank][step]: what was told, as [what, name, time], of three blocks and two steps. See `tell_order`."""
    if not told_order:
        fault = {"kind": "tell order", "rank": None, "step": 2}
        results = train_together(2, tmp_path / "run", "--steps", 2, "model.depth=3", fault=fault)
        assert_all_end_with(results, 0)
        for result in results:
            lines = [line.split(" ")[1:] for line in result["out"].splitlines() if line.startswith("told ")]
            second = lines.index(next(line for line in lines if line[:2] == ["batch", "2"]))
            told_order.append([lines[:second], lines[second:]])
    return told_order


def test_segments_are_averaged_in_one_order_while_backward_goes_on(told):
    steps = [step for steps in told for step in steps]
    for step in steps:
        # The last block is on its way before the first has a gradient, and so on.
        places = [
            next(place for place, (_, name, _) in enumerate(step) if name.startswith(f"blocks.{block}."))
            for block in (2, 1, 0)
        ]
        begun = [sum(what == "reduce-scatter" for what, _, _ in step[:place]) for place in places]
        assert begun == sorted(set(begun))
        # Nothing is left for the time after backward.
        last = max(place for place, (what, _, _) in enumerate(step) if what in ("gradient", "reduce-scatter"))
        assert step[last][0] == "reduce-scatter" and step[last + 1][0] == "backward"
        names = [name for what, name, _ in step if what == "gradient"]
        assert len(names) == len(set(names)) > 60
    sizes = [[size for what, size, _ in step if what == "reduce-scatter"] for step in steps]
    assert sizes == [sizes[0]] * 4 and len(sizes[0]) > 20


def test_no_device_waits_for_the_batch_of_another_process(told):
    for step in (0, 1):
        batches, began = (
            [float(next(line for line in steps[step] if line[0] == what)[2]) for steps in told]
            for what in ("batch", "reduce-scatter")
        )
        assert max(batches) < min(began)
    assert batches[1] > batches[0] + 0.5  # it was late


def test_averaging_while_backward_goes_on_or_after_it_is_the_same_to_the_bit(train_together, whole, tmp_path):
    """A step that is replayed as a graph is averaged after its backward. One process does that, the other does not."""
    for world_size in (2, 3):
        out, expected = tmp_path / str(world_size), whole(world_size)
        fault = {"kind": "replay", "rank": 1, "step": 0}
        results = train_together(world_size, out, "--steps", STEPS, DTYPES[world_size], fault=fault)
        assert_all_end_with(results, 0)
        assert read_losses(out) == read_losses(expected)
        assert_same_weights(checkpoint_of(out, STEPS), checkpoint_of(expected, STEPS))


def test_of_two_processes_the_segments_change_nothing(train_together, tmp_path):
    """a + b is b + a. The norm alone is added in another order, so nothing is clipped here; with more processes other
    gradients are added in another order, too."""
    for segment in (1 << 10, 1 << 24):
        more = ["--steps", 2, "grad_clip=None", "dtype=bf16"]
        assert_all_end_with(train_together(2, tmp_path / str(segment), *more, segment=segment), 0)
    few, many = (tmp_path / str(segment) for segment in (1 << 24, 1 << 10))
    for one, other in zip(read_metrics(few / "metrics.jsonl"), read_metrics(many / "metrics.jsonl"), strict=True):
        assert one["loss"] == other["loss"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert_same_weights(checkpoint_of(few, 2), checkpoint_of(many, 2))


def test_the_order_goes_on_with_another_number_of_processes(train_together, train, tmp_path, table, config):
    """3 processes, then 1, then 2: together they take every micro-batch of the epoch once, in its order."""
    out = tmp_path / "run"
    assert_all_end_with(train_together(3, out, "--steps", 1), 0)
    code, text, error = train(out, "--steps", 2, "--resume", "auto")
    assert code == 0, error
    assert "note: the number of processes is now 1, the checkpoint was trained with 3" in text
    assert "note: a step takes 1 micro-batch in place of 3: their order goes on" in text
    results = train_together(2, out, "--steps", 4, "--resume", "auto")
    assert_all_end_with(results, 0)
    assert "note: the number of processes is now 2, the checkpoint was trained with 1" in results[0]["out"]
    assert "note: a step takes 2 micro-batches in place of 1: their order goes on" in results[0]["out"]
    rows = read_metrics(out / "metrics.jsonl")
    assert [(row["epoch"], row["micro_batch"]) for row in rows] == [(0, 0), (0, 3), (0, 4), (1, 0)]
    sampler = read_data(load_train_config(config, [], {"dataset.data_path": str(table)}).config).sampler
    order = [list(micro_batch.bucket) for micro_batch in sampler.iterate(0, 0)]
    assert sum((row.get("buckets", [row["bucket"]]) for row in rows[:3]), []) == order
    assert json.loads((checkpoint_of(out, 4) / "state.json").read_text())["sampler"]["consumed"] == 2


def test_a_step_is_described_for_all_processes(whole, table):
    rows = read_metrics(whole(3) / "metrics.jsonl")
    for row in rows:
        sizes = [(1 if bucket[1] == 4 else 2, bucket[1]) for bucket in row["buckets"]]
        assert len(sizes) == 3 and row["bucket"] == row["buckets"][0]
        assert row["batch_size"] == sum(clips for clips, _ in sizes)
        assert row["tokens"] == sum(clips * frames * 9 * 16 for clips, frames in sizes)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_time"])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {path.name for path in whole(3).iterdir()}
    assert names == {".lock", "checkpoints", "config.json", "encoders", "kernels.json", "metrics.jsonl"}


@pytest.mark.parametrize(("kind", "ranks"), [("nan loss", [1]), ("replay, nan loss", [1]), ("nan gradient", [0, 1])])
def test_what_is_not_finite_in_one_process_stops_all_before_the_step(train_together, whole, tmp_path, kind, ranks):
    out = tmp_path / "run"
    results = train_together(2, out, "--steps", STEPS, fault={"kind": kind, "rank": 1, "step": 3})
    assert_all_end_with(results, 1)
    name = "loss" if "loss" in kind else "gradient norm"
    assert f"rank 0: error: step 3: the {name} is nan" in results[0]["error"] and LOST in results[1]["error"]
    report = json.loads((out / "nonfinite.json").read_text())
    assert [batch["rank"] for batch in report["batches"]] == ranks
    assert [batch["micro_batch"] for batch in report["batches"]] == [4 + rank for rank in ranks]
    assert report["replay"] in results[0]["error"]
    assert report["replay"].startswith("torchrun --standalone --nproc-per-node 2 -m opensora_fast train ")
    assert len(read_losses(out)) == 2
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(whole(2), 2))


def test_a_signal_to_one_process_stops_all_after_the_step(train_together, whole, tmp_path):
    out = tmp_path / "run"
    results = train_together(2, out, "--steps", STEPS, fault={"kind": "sigterm", "rank": 1, "step": 2})
    assert_all_end_with(results, 128 + signal.SIGTERM)
    assert "stopped by signal 15; --resume auto continues" in results[0]["out"]
    assert read_losses(out) == read_losses(whole(2))[:2]
    assert list((out / "checkpoints").iterdir()) == [checkpoint_of(out, 2)]
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(whole(2), 2))


def test_nobody_ends_before_rank_0_has_written_everything(train_together, features, tmp_path):
    """Or torchrun would end rank 0 when another process ends with the number of a signal."""
    fault = {"kind": "report slowly", "rank": 0, "step": 0}
    results = train_together(2, tmp_path / "run", "--steps", 1, features, fault=fault)
    assert_all_end_with(results, 0)
    assert abs(results[0]["time"] - results[1]["time"]) < 1


@pytest.mark.parametrize("kind", ["out of memory", "out of memory in backward"])
def test_an_error_in_one_process_ends_all_with_its_message(train_together, tmp_path, kind):
    out = tmp_path / "run"
    fault = {"kind": kind, "rank": 1, "step": 4}
    results = train_together(3, out, "--steps", STEPS, "ckpt_every=2", fault=fault)
    assert_all_end_with(results, 1)
    assert "opensora-fast, rank 1: error: step 4: out of GPU memory with 2 clips of bucket" in results[1]["error"]
    assert all(f"rank {rank}: error: {LOST}" in results[rank]["error"] for rank in (0, 2))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert [row[0] for row in read_losses(out)] == [1, 2, 3]


def test_no_process_waits_to_give_its_shard_of_a_checkpoint_that_cannot_be_written(train_together, features, tmp_path):
    """It has an error of its own, and rank 0 waits for it elsewhere. Both say what is wrong."""
    out = tmp_path / "run"
    fault = {"kind": "out of memory while the disk is full", "rank": None, "step": 3}
    results = train_together(2, out, "--steps", STEPS, "ckpt_every=1", features, fault=fault, seconds=30)
    assert_all_end_with(results, 1)
    assert "rank 1: error: step 3: out of GPU memory" in results[1]["error"]
    assert re.search("rank 0: error: the checkpoint .* could not be written: no space left", results[0]["error"])
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-00000001"}


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("kill", 1), ("kill in backward", 1), ("kill while giving a shard", 1), ("kill while writing", 0)],
)
def test_kill_minus_9_of_one_process_ends_the_others_and_leaves_a_good_checkpoint(
    train_together, whole, tmp_path, kind, rank
):
    out = tmp_path / "run"
    fault = {"kind": kind, "rank": rank, "step": 3}
    results = train_together(2, out, "--steps", STEPS, "ckpt_every=1", "keep_checkpoints=1", fault=fault)
    assert [result["code"] for result in results] == [-signal.SIGKILL if rank == other else 1 for other in range(2)]
    assert LOST in results[1 - rank]["error"]
    told = []
    assert find_newest(out / "checkpoints", told.append) == checkpoint_of(out, 2) and not told
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(whole(2), 2))
    if kind in ("kill", "kill in backward"):
        return
    # What is left of the checkpoint does not stand in the way.
    assert any(path.name.startswith(".unfinished") for path in (out / "checkpoints").iterdir())
    assert_all_end_with(train_together(2, out, "--steps", STEPS, "--resume", "auto"), 0)
    assert read_losses(out) == read_losses(whole(2))
    assert_same_weights(checkpoint_of(out, STEPS), checkpoint_of(whole(2), STEPS))
    assert not any(path.name.startswith(".unfinished") for path in (out / "checkpoints").iterdir())


def test_a_process_that_is_lost_while_it_gives_a_shard_keeps_no_other(train_together, features, tmp_path):
    """Some have shards to give yet, which rank 0 takes: none of them would end before, and others wait for them."""
    fault = {"kind": "kill while giving a shard", "rank": 2, "step": 2}
    results = train_together(5, tmp_path / "run", "--steps", STEPS, "ckpt_every=1", features, fault=fault, seconds=30)
    assert [result["code"] for result in results] == [1, 1, -signal.SIGKILL, 1, 1]


def test_bad_clips_of_every_process_are_listed_and_told(train_together, tmp_path, table):
    folder = tmp_path / "clips"
    shutil.copytree(table.parent, folder)
    for number in (0, 4, 8):
        path = next(folder.glob(f"{number}.*"))
        path.write_bytes(path.read_bytes()[:100])
    out = tmp_path / "run"
    results = train_together(2, out, "--steps", 3, "--data-path", folder / "meta.csv")
    assert_all_end_with(results, 0)
    bad = read_bad_clips(out / "bad_clips.jsonl")
    assert {clip["row"] for clip in bad} == {0, 4, 8}
    by_rank = [{int(row) for row in re.findall(r"bad clip \(row (\d+)", result["error"])} for result in results]
    assert all(by_rank) and by_rank[0] | by_rank[1] == {0, 4, 8}
    assert f"rank 1: bad clip (row {next(iter(by_rank[1]))}, replaced)" in results[1]["error"]


@pytest.fixture
def features(train_together, folder_of_wholes):
    """The override that trains from cached features; two processes have written them."""
    folder = folder_of_wholes / "features"
    if not folder.exists():
        results = train_together(2, folder_of_wholes / "writes_features", "--steps", 3, f"features={folder}")
        assert_all_end_with(results, 0)
        assert "features: encoding 10 clips" in results[0]["out"]
    return f"features={folder}"


def test_features_are_written_by_one_process_and_read_by_all(
    train_together, whole, features, folder_of_wholes, tmp_path
):
    results = train_together(2, tmp_path / "reads", "--steps", 3, features)
    assert_all_end_with(results, 0)
    assert "features: encoding" not in results[0]["out"]
    expected = read_losses(whole(2))[:3]
    assert read_losses(tmp_path / "reads") == read_losses(folder_of_wholes / "writes_features") == expected


def test_mistakes_are_told_and_leave_no_folder(train_together, tmp_path):
    for more, errors in (
        # every process sees it
        (["bucket_config={'144p': {1: (1.0, 4)}}"], ["1 micro-batch cannot serve 2 processes"] * 2),
        # only rank 0 looks
        (["--resume", tmp_path / "nothing"], ["no such folder", LOST]),
    ):
        results = train_together(2, tmp_path / "run", "--steps", 1, *more)
        assert_all_end_with(results, 1)
        assert all(error in result["error"] for error, result in zip(errors, results, strict=True))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_printed_once_for_all(train, tmp_path, monkeypatch):
    places = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for rank in ("0", "1"):
        for key, value in (places | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(key, value)
        code, text, _ = train(tmp_path / "run", "--dry-run")
        assert code == 0
        assert "2 steps of 3 micro-batches" in text if rank == "0" else text == ""


def test_the_processors_of_a_machine_are_shared(monkeypatch):
    monkeypatch.setattr(training, "count_processors", lambda: 12)
    alone, many = Processes(CPU), SimpleNamespace(world_size=16, local_world_size=8)
    configured, free = SimpleNamespace(cpu_threads=5), SimpleNamespace(cpu_threads=None)
    assert [choose_cpu_threads(configured, processes) for processes in (alone, many)] == [5, 5]
    assert choose_cpu_threads(free, alone) is None and choose_cpu_threads(free, many) == 1
    many.local_world_size = 4
    assert choose_cpu_threads(free, many) == 3


def test_the_replay_of_several_machines_names_their_number(tmp_path):
    processes = SimpleNamespace(world_size=16, local_world_size=8, device=torch.device("cuda", 3))
    command = describe_replay(tmp_path / "run", tmp_path / "step-00000004", 5, processes)
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 -m opensora_fast train ")
    assert command.endswith("run-replay-5 --steps 5 --device cuda")


def test_torchrun_stops_all_on_sigterm(config, table, features, tmp_path):
    out = tmp_path / "run"
    words = ["--standalone", "--nproc-per-node", "2", "-m", "opensora_fast", "train", str(config)]
    words += ["--data-path", str(table), "--out", str(out), "--device", "cpu", "--steps", "5000", features]
    # torchrun of this environment, whatever `PATH` is.
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2400):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 2:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by signal 15; --resume auto continues" in text, error
    assert list((out / "checkpoints").iterdir()) == [checkpoint_of(out, len(read_losses(out)))]


def test_the_command_that_is_told_replays_a_step_that_is_not_finite(train_together, run_together, features, tmp_path):
    out = tmp_path / "run"
    assert_all_end_with(train_together(2, out, "--steps", 9, "lr=1e25", "grad_clip=None", features), 1)
    report = json.loads((out / "nonfinite.json").read_text())
    words = shlex.split(report["replay"])
    torchrun = get_args_parser().parse_args(words[1:])
    assert words[0] == "torchrun" and torchrun.standalone and torchrun.nproc_per_node == "2"
    assert torchrun.module and torchrun.training_script == "opensora_fast"
    results = run_together(2, torchrun.training_script_args)
    assert_all_end_with(results, 1)
    assert f"rank 0: error: step {report['step']}: the {report['what']} is" in results[0]["error"]
    replayed = json.loads((tmp_path / f"run-replay-{report['step']}" / "nonfinite.json").read_text())
    assert all(replayed[key] == report[key] for key in ("step", "what", "batches"))
