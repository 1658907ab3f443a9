"""Processes that share their micro-batches (`sp_size`) train as one process on each would, and stop together."""

import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from joint_runs import LOST, assert_all_end_with, checkpoint_of
from losses import read_losses
from safetensors.torch import load_file
from same_checkpoints import assert_same_weights
from toy_steps import SHAPES, make_batch

from opensora_fast import STDiT2Config
from opensora_fast.data.bad_clips import read_bad_clips
from opensora_fast.train.monitoring.metrics import read_metrics
from opensora_fast.train.monitoring.not_finite import find_not_finite

STEPS = 4


@pytest.fixture(scope="module")
def folder_of_pairs(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def pair(train_together, folder_of_pairs):
    """A run of two processes that share every micro-batch and was never stopped; only read by the tests."""
    out = folder_of_pairs / "run"
    if not out.exists():
        assert_all_end_with(train_together(2, out, "sp_size=2", "--steps", STEPS, "ckpt_every=2"), 0)
    return out


def assert_same_training(out, expected, steps, tolerance=1e-5):
    """Losses and norms up to rounding, and where the optimizer has not yet made a sign of it, the weights."""
    rows, rows_expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, expected))
    for row, row_expected in zip(rows[:steps], rows_expected[:steps], strict=True):
        assert row["loss"] == pytest.approx(row_expected["loss"], rel=tolerance)
        assert row["grad_norm"] == pytest.approx(row_expected["grad_norm"], rel=tolerance)
        for key in ("step", "epoch", "micro_batch", "bucket", "buckets", "batch_size", "tokens"):
            assert row.get(key) == row_expected.get(key)


def test_two_processes_that_share_take_the_steps_of_one(pair, train, tmp_path):
    """Every kind of micro-batch: images, and videos of 2 and 4 frames, with and without given frames."""
    one = tmp_path / "one"
    code, _, error = train(one, "--steps", STEPS, "ckpt_every=2")
    assert code == 0, error
    assert_same_training(pair, one, STEPS)
    for name in ("model", "ema"):
        weights, expected = (load_file(checkpoint_of(out, 2) / name / "model.safetensors") for out in (pair, one))
        wrong = torch.cat([((weights[key] - expected[key]).abs() > 1e-5).flatten() for key in expected])
        assert wrong.float().mean() < 1e-3  # a first step of AdamW is the sign of a gradient, however small
    assert len({row["bucket"][1] for row in read_metrics(one / "metrics.jsonl")}) > 1


def test_pairs_take_the_steps_of_as_many_processes(train_together, tmp_path):
    """Each pair draws what a process alone would draw."""
    runs = tmp_path / "pairs", tmp_path / "alone"
    assert_all_end_with(train_together(4, runs[0], "sp_size=2", "--steps", 2, "grad_checkpoint=True"), 0)
    assert_all_end_with(train_together(2, runs[1], "--steps", 2), 0)
    assert_same_training(*runs, steps=2)


def test_bfloat16_is_shared_too(train_together, train, tmp_path):
    runs = tmp_path / "pair", tmp_path / "one"
    assert_all_end_with(train_together(2, runs[0], "sp_size=2", "--steps", 1, "dtype=bf16"), 0)
    code, _, error = train(runs[1], "--steps", 1, "dtype=bf16")
    assert code == 0, error
    assert_same_training(*runs, steps=1, tolerance=2**-6)


def test_stop_and_resume_is_exact(train_together, pair, tmp_path):
    out = tmp_path / "run"
    for steps in (1, STEPS):
        results = train_together(2, out, "sp_size=2", "--steps", steps, "--resume", "auto")
        assert_all_end_with(results, 0)
    assert read_losses(out) == read_losses(pair)
    assert_same_weights(checkpoint_of(out, STEPS), checkpoint_of(pair, STEPS))


def test_the_order_goes_on_when_processes_begin_to_share(train_together, pair, train, tmp_path):
    out = tmp_path / "run"
    code, _, error = train(out, "--steps", 1)
    assert code == 0, error
    results = train_together(2, out, "sp_size=2", "--steps", STEPS, "--resume", "auto")
    assert_all_end_with(results, 0)
    assert "the number of processes is now 2, the checkpoint was trained with 1" in results[0]["out"]
    assert "sp_size is now 2, the checkpoint was trained with 1" in results[0]["out"]
    assert "a step takes" not in results[0]["out"]
    assert_same_training(out, pair, STEPS, tolerance=1e-3)


def test_only_the_first_of_a_pair_reads_clips(train_together, tmp_path, table):
    folder = tmp_path / "clips"
    shutil.copytree(table.parent, folder)
    for number in (0, 4, 8):
        path = next(folder.glob(f"{number}.*"))
        path.write_bytes(path.read_bytes()[:100])
    out = tmp_path / "run"
    results = train_together(2, out, "sp_size=2", "--steps", 6, "--data-path", folder / "meta.csv")
    assert_all_end_with(results, 0)
    assert {clip["row"] for clip in read_bad_clips(out / "bad_clips.jsonl")} == {0, 4, 8}
    by_rank = [{int(row) for row in re.findall(r"bad clip \(row (\d+)", result["error"])} for result in results]
    assert by_rank == [{0, 4, 8}, set()]


def test_features_are_read_by_the_first_of_a_pair(train_together, pair, tmp_path):
    features = f"features={tmp_path / 'features'}"
    results = train_together(2, tmp_path / "run", "sp_size=2", "--steps", 3, features)
    assert_all_end_with(results, 0)
    assert read_losses(tmp_path / "run") == read_losses(pair)[:3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_before_the_step(train_together, pair, tmp_path, rank):
    out = tmp_path / "run"
    results = train_together(2, out, "sp_size=2", "--steps", STEPS, fault={"kind": "nan loss", "rank": rank, "step": 3})
    assert_all_end_with(results, 1)
    assert "rank 0: error: step 3: the loss is" in results[0]["error"] and LOST in results[1]["error"]
    assert json.loads((out / "nonfinite.json").read_text())["replay"].startswith("torchrun --standalone ")
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(pair, 2))


def test_a_shared_micro_batch_that_is_not_finite_is_listed_once():
    batch = make_batch(4, SHAPES[0], STDiT2Config.small())
    pair = SimpleNamespace(rank=0, gather=lambda own: [own, own | {"rank": 1}])
    assert [(found["rank"], found["micro_batch"]) for found in find_not_finite(pair, math.nan, batch)] == [(0, 4)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_step(train_together, pair, tmp_path, rank):
    out = tmp_path / "run"
    results = train_together(2, out, "sp_size=2", "--steps", STEPS, fault={"kind": "sigterm", "rank": rank, "step": 2})
    assert_all_end_with(results, 128 + signal.SIGTERM)
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(pair, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_minus_9_of_one_process_ends_the_others(train_together, pair, tmp_path, rank):
    out = tmp_path / "run"
    fault = {"kind": "kill", "rank": rank, "step": 3}
    results = train_together(2, out, "sp_size=2", "--steps", STEPS, "ckpt_every=1", fault=fault)
    assert [result["code"] for result in results] == [-signal.SIGKILL if rank == other else 1 for other in range(2)]
    assert LOST in results[1 - rank]["error"]
    assert_same_weights(checkpoint_of(out, 2), checkpoint_of(pair, 2))


@pytest.mark.parametrize(
    ("world_size", "size", "error"),
    [
        (3, 2, "sp_size=2: 3 processes do not form groups of 2"),
        (3, 3, "sp_size=3: the 2 heads of the model cannot be shared out evenly"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_all(train_together, tmp_path, world_size, size, error):
    results = train_together(world_size, tmp_path / "run", f"sp_size={size}", "--steps", 1)
    assert_all_end_with(results, 1)
    assert all(error in result["error"] for result in results)
    assert not (tmp_path / "run").exists()


def test_a_process_alone_cannot_share(train, tmp_path):
    for more in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 1, "sp_size=2", *more)
        assert code == 1 and "sp_size=2: 1 process does not form groups of 2" in error
    assert not (tmp_path / "run").exists()
