"""TensorBoard and Weights & Biases show what `metrics.jsonl` has, each step once, and end no run."""

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from losses import read_losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora_fast.train.monitoring.metrics import read_metrics
from opensora_fast.train.monitoring.trackers import TensorBoard, check_trackers, get_numbers


@pytest.fixture
def wandb(monkeypatch):
    """See `stand_ins/wandb.py`."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
    yield importlib.import_module("wandb")
    monkeypatch.delitem(sys.modules, "wandb")


def rows_of(out):
    return {row["step"]: get_numbers(row) for row in read_metrics(out / "metrics.jsonl")}


def points_of(out):
    """{tag: [(step, value), ...]} as TensorBoard reads them."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_points_are_the_rows(out):
    rows, points = rows_of(out), points_of(out)
    assert set(points) == set(rows[1]) >= {"loss", "grad_norm", "lr", "tokens_per_s", "memory", "epoch"}
    for tag, found in points.items():
        assert [step for step, _ in found] == list(rows)
        assert [value for _, value in found] == pytest.approx([row[tag] for row in rows.values()], rel=1e-6)


def lose_last_checkpoint(out, step):
    shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")


def test_tensorboard_has_each_step_once_after_a_resume_from_an_earlier_checkpoint(train, tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", 3, "ckpt_every=2", "tensorboard=True")[0] == 0
    assert_points_are_the_rows(out)
    lose_last_checkpoint(out, 3)
    before = dict(points_of(out)["lr"])
    code, _, error = train(out, "--steps", 5, "--resume", "auto", "tensorboard=True", "lr=5e-4")
    assert code == 0, error
    assert_points_are_the_rows(out)
    after = dict(points_of(out)["lr"])
    assert before[3] == pytest.approx(1e-3) and after[3] == pytest.approx(5e-4) and after[2] == pytest.approx(1e-3)


def test_points_are_there_as_soon_as_they_are_written(tmp_path):
    tracker = TensorBoard(tmp_path, 0)
    for step in (1, 2):
        tracker.write(step, {"loss": 1 / step})
        assert points_of(tmp_path)["loss"][-1] == (step, 1 / step)
    tracker.close(failed=False)


def test_wandb_is_given_the_rows_of_one_run(train, tmp_path, wandb):
    out = tmp_path / "run"
    assert train(out, "--steps", 3, "ckpt_every=2", "wandb=True")[0] == 0
    (run,) = wandb.runs
    assert run.history == rows_of(out) and run.exit_code == 0
    assert run.arguments["name"] == "run" and run.arguments["project"] == "opensora_fast"
    assert run.arguments["dir"] == str(out.resolve()) and run.arguments["config"]["model"]["depth"] == 1
    lose_last_checkpoint(out, 3)
    code, _, error = train(out, "--steps", 5, "--resume", "auto", "wandb=True")
    assert code == 0, error
    assert "note: Weights & Biases has steps up to 3 of this run already, and keeps them" in error
    again = wandb.runs[1]
    assert again.arguments["id"] == run.arguments["id"] == (out / "wandb_run_id").read_text().strip()
    assert list(again.history) == [1, 2, 3, 4, 5] and again.history[3] == run.history[3] and not again.left_out
    # A row that was written, but that wandb had not sent when it was killed, is sent now.
    del again.history[5]
    assert train(out, "--steps", 6, "--resume", "auto", "wandb=True")[0] == 0
    assert list(wandb.runs[2].history) == [1, 2, 3, 4, 5, 6]
    assert wandb.runs[2].history[5] == rows_of(out)[5]
    code, _, error = train(out, "--steps", 7, "--resume", "auto", "wandb=True")
    assert code == 0 and "Weights & Biases" not in error  # nothing to tell where it has what the run has
    # Another folder is another run.
    assert train(tmp_path / "other", "--steps", 7, "--resume", out, "wandb=True")[0] == 0
    assert wandb.runs[4].arguments["id"] != run.arguments["id"] and not wandb.runs[4].history


def test_each_offline_folder_of_wandb_is_whole(train, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    out = tmp_path / "run"
    assert train(out, "--steps", 3, "ckpt_every=2", "wandb=True")[0] == 0
    lose_last_checkpoint(out, 3)
    assert train(out, "--steps", 4, "--resume", "auto", "wandb=True", "lr=5e-4")[0] == 0
    assert wandb.runs[1].history == rows_of(out) and list(rows_of(out)) == [1, 2, 3, 4]
    assert len({run.arguments["id"] for run in wandb.runs}) == 1 and wandb.runs[1].arguments["project"] == "mine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_tracker_that_fails_is_switched_off_and_told_once(train, tmp_path, wandb, monkeypatch, whole):
    out, real = tmp_path / "run", TensorBoard.write

    def fill_disk(self, step, numbers):
        if step == 2:
            (events,) = (out / "tensorboard").iterdir()
            events.unlink()
            events.symlink_to("/dev/full")
        real(self, step, numbers)

    monkeypatch.setattr(TensorBoard, "write", fill_disk)
    monkeypatch.setattr(wandb, "fails_at", 3)
    code, _, error = train(out, "--steps", 5, "ckpt_every=4", "tensorboard=True", "wandb=True")
    assert code == 0, error
    for key, reason in (("tensorboard", "No space left on device"), ("wandb", "the network is gone")):
        (line,) = [line for line in error.splitlines() if line.startswith(f"warning: {key}")]
        assert "has failed and is switched off; metrics.jsonl goes on" in line and reason in line
    assert list(wandb.runs[0].history) == [1, 2]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    assert read_losses(out) == read_losses(whole)[:5]


def test_wandb_is_told_that_a_run_has_failed(train, tmp_path, wandb):
    assert train(tmp_path / "run", "--steps", 3, "wandb=True", "lr=1e25", "grad_clip=None")[0] == 1
    assert wandb.runs[0].exit_code == 1


def test_wandb_that_cannot_begin_stops_before_the_first_step(train, tmp_path, wandb, monkeypatch):
    out = tmp_path / "run"
    assert train(out, "--steps", 1)[0] == 0
    monkeypatch.setattr(wandb, "fails_at", 0)
    code, _, error = train(out, "--steps", 2, "--resume", "auto", "wandb=True", "tensorboard=True")
    assert code == 1 and "Traceback" not in error
    assert "wandb=True, but Weights & Biases cannot begin: No API key" in error and "WANDB_MODE=offline" in error
    assert len(read_losses(out)) == 1 and not (out / "tensorboard").exists()


def test_a_tracker_is_ended_where_the_next_cannot_begin(train, tmp_path, wandb):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in its way")
    code, _, error = train(tmp_path / "run", "--steps", 1, "tensorboard=True", "wandb=True")
    assert code == 1 and f"File exists: {tmp_path / 'run' / 'tensorboard'}" in error
    assert [run.exit_code for run in wandb.runs] == [1]


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_is_made(train, tmp_path, monkeypatch, key):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == key else real(name))
    for dry in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 1, f"{key}=True", *dry)
        assert code == 1 and f"{key}=True needs the package {key}: pip install {key}" in error
        assert not (tmp_path / "run").exists()


def test_a_folder_that_wandb_writes_into_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(ValueError, match="wandb=True needs the package wandb"):
        check_trackers(SimpleNamespace(tensorboard=False, wandb=True))


def test_only_finite_numbers_are_given_to_trackers():
    row = {"step": 3, "loss": 0.5, "epoch": 0, "vb": float("nan"), "bucket": ["144p", 4, "1.00"], "buckets": None}
    assert get_numbers(row) == {"loss": 0.5, "epoch": 0}
