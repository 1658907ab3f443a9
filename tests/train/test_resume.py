"""Stopping and going on, at any step and by any means, gives the numbers of a run that was never stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from losses import read_losses
from safetensors.torch import load_file
from same_checkpoints import assert_same_weights
from toy_steps import make_trainer

from opensora_fast import cli
from opensora_fast.train import loop
from opensora_fast.train.checkpoints import state
from opensora_fast.train.inputs.followers import lead
from opensora_fast.train.loop import Trainer

STEPS = 9  # those of `whole`; an epoch has 6


def last(out):
    return out / "checkpoints" / f"step-{STEPS:08d}"


def test_stop_at_any_step_and_resume(train, tmp_path, whole):
    """Step 0, 1, in the middle of an epoch, at its edge, just after it, and the last."""
    for stop in (0, 1, 4, 6, 7, STEPS):
        out = tmp_path / f"stop{stop}"
        assert train(out, "--steps", stop)[0] == 0
        code, text, error = train(out, "--steps", STEPS, "--resume", "auto")
        assert code == 0, error
        assert stop == 0 or f"after step {stop}" in text
        assert read_losses(out) == read_losses(whole), stop
        assert_same_weights(last(out), last(whole))


def test_stop_at_every_step_in_bf16(train, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(whole, "--steps", 7, "dtype=bf16")[0] == 0
    for steps in (0, 1, 2, 5, 6, 7):
        assert train(out, "--steps", steps, "--resume", "auto", "dtype=bf16")[0] == 0
    assert read_losses(out) == read_losses(whole)


def test_resume_into_another_folder_and_from_an_older_checkpoint(train, tmp_path, whole):
    first = tmp_path / "first"
    assert train(first, "--steps", 6, "ckpt_every=3")[0] == 0
    out = tmp_path / "second"
    assert train(out, "--steps", STEPS, "--resume", first / "checkpoints" / "step-00000003")[0] == 0
    assert read_losses(out) == read_losses(whole)[3:]
    assert_same_weights(last(out), last(whole))
    code, _, error = train(first, "--steps", STEPS, "--resume", first / "checkpoints" / "step-00000003")
    assert code == 1 and "holds later checkpoints" in error and "step-00000006" in error
    # and through the configuration
    assert train(tmp_path / "third", "--steps", STEPS, f"load={first}")[0] == 0
    assert read_losses(tmp_path / "third") == read_losses(whole)[6:]


def test_a_checkpoint_may_have_any_name(train, tmp_path, whole):
    """Renamed in its own folder, it is not one of those that the run counts; elsewhere its step says what is later."""
    out = tmp_path / "run"
    assert train(out, "--steps", 4, "ckpt_every=0")[0] == 0
    best = (out / "checkpoints" / "step-00000004").rename(out / "checkpoints" / "best")
    code, _, error = train(out, "--steps", STEPS, "--resume", best)
    assert code == 0, error
    assert_same_weights(last(out), last(whole))
    other = tmp_path / "other"
    code, _, error = train(other, "--steps", STEPS, "--resume", best)
    assert code == 0, error
    code, _, error = train(other, "--steps", STEPS, "--resume", best)
    assert code == 1 and f"{other} holds later checkpoints than {best} (step-{STEPS:08d})" in error


def test_rows_of_two_runs_are_not_joined(train, tmp_path, whole):
    out = tmp_path / "run"
    assert train(out, "--steps", 2)[0] == 0
    own = out / "checkpoints" / "step-00000002"
    rows = (out / "metrics.jsonl").read_bytes()
    other = ["--steps", STEPS, "--resume", whole], ["--steps", STEPS, "--resume", "auto", f"load={whole}"]
    early = tmp_path / "early"
    assert train(early, "--steps", 1)[0] == 0
    code, _, error = train(out, *other[0])
    assert code == 1 and f"{out} holds a run of its own" in error and "give another --out" in error
    moved = own.rename(tmp_path / "moved")
    for more in (*other, ["--resume", moved], ["--resume", early]):
        assert train(out, *more)[0] == 1
    assert (out / "metrics.jsonl").read_bytes() == rows and not list((out / "checkpoints").iterdir())
    # As it is told: into the folder of the run's checkpoints, under any name.
    best = moved.rename(out / "checkpoints" / "best")
    code, _, error = train(out, "--steps", 3, "--resume", best)
    assert code == 0, error
    assert read_losses(out) == read_losses(whole)[:3]


def test_resume_from_the_configuration_that_the_run_wrote(train, tmp_path, whole):
    out = tmp_path / "run"
    assert train(out, "--steps", 4)[0] == 0
    assert cli.run(["train", str(out / "config.json"), "--out", str(out), "--resume", "auto", "--steps", "9"]) == 0
    assert read_losses(out) == read_losses(whole)


def test_the_configuration_that_a_run_wrote_works_from_any_folder(config, tmp_path, table, monkeypatch):
    shutil.copytree(table.parent, tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    values = ("dataset.data_path=clips/meta.csv", "features=cached")
    assert cli.run(["train", str(config), "--out", "run", "--device", "cpu", "--steps", "0", *values]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["dataset"]["data_path"] == str(tmp_path / "clips" / "meta.csv")
    assert written["features"] == str(tmp_path / "cached")


def test_weights_and_optimizer_state_into_a_new_order(train, tmp_path, whole):
    others = ("seed=1", "bucket_config={'144p': {1: (1.0, 2)}}")
    code, _, error = train(tmp_path / "run", "--steps", 2, f"load={whole}", "start_from_scratch=True", *others)
    assert code == 0, error
    fitted = "encoders/vae/linear_autoencoder.safetensors"  # the weights are of its latents, whatever the clips now are
    assert (tmp_path / "run" / fitted).read_bytes() == (whole / fitted).read_bytes()
    rows = read_losses(tmp_path / "run")
    assert [row[0] for row in rows] == [1, 2] and rows[0][6:] == (0, 0)
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    assert float(moments["step"]) == STEPS + 2


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, whole):
    out = tmp_path / "run"
    assert train(out, "--steps", 6, "ckpt_every=3")[0] == 0
    weights = out / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, text, error = train(out, "--steps", STEPS, "--resume", "auto")
    assert code == 0, error
    assert "optimizer.safetensors is damaged" in text and "after step 3" in text
    assert read_losses(out) == read_losses(whole)
    # The damaged one does not count among those that are kept.
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000003", f"step-{STEPS:08d}"]
    shutil.rmtree(last(out) / "ema")
    code, _, error = train(tmp_path / "other", "--resume", last(out), "--steps", STEPS)
    assert code == 1 and "ema" in error and "is missing" in error


def test_the_only_checkpoint_that_is_kept_is_a_whole_one(train, tmp_path, whole):
    out = tmp_path / "run"
    assert train(out, "--steps", 8, "ckpt_every=4")[0] == 0
    (out / "checkpoints" / "step-00000008" / "complete.json").write_text("")
    assert train(out, "--steps", 5, "--resume", "auto", "keep_checkpoints=1")[0] == 0
    assert train(out, "--steps", STEPS, "--resume", "auto", "keep_checkpoints=1")[0] == 0
    assert read_losses(out) == read_losses(whole)


def test_a_run_that_has_its_steps_says_that_none_is_left(train, tmp_path, whole):
    code, text, error = train(tmp_path / "run", "--steps", 5, "--resume", whole)
    assert "train: 0 steps" in error
    assert code == 0 and "note: no step is left to train: `steps` or --steps is 5, and counts all of a run" in text
    assert not read_losses(tmp_path / "run")


def test_a_run_without_a_step_left_keeps_the_list_of_the_ops_that_ran(train, tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", 2)[0] == 0
    before = (out / "kernels.json").read_text()
    code, text, _ = train(out, "--steps", 2, "--resume", "auto")
    assert code == 0 and "note: no step is left to train" in text
    assert (out / "kernels.json").read_text() == before != "[]\n"


def test_another_order_of_batches_is_refused_before_anything_is_made(train, tmp_path, whole):
    out = tmp_path / "run"
    for override, message in (
        ("seed=1", "with seed=42, and it is now 1"),
        ("dataset.frame_interval=2", "another table of clips"),
        ("bucket_config.144p.1=(1.0, 1)", "another table of clips"),
        (f"features={tmp_path / 'features'}", "with clips, not features"),
    ):
        code, _, error = train(out, "--resume", whole, "--steps", STEPS, override, "drop_last=False")
        assert code == 1 and message in error and f"load={last(whole)} start_from_scratch=True" in error, error
        assert "an --out that holds no run" in error
        assert not out.exists() and not (tmp_path / "features").exists()


def test_another_model_is_refused_and_told_by_its_key(train, tmp_path, whole):
    for override, note, message in (
        ("model.depth=2", "model.depth is now 2, the checkpoint was trained with 1", "of another model: blocks.1"),
        (
            "model.freeze=not_temporal",
            "model.freeze is now 'not_temporal'",
            "of another model or model.freeze: exp_avg",
        ),
    ):
        code, text, error = train(tmp_path / "run", "--resume", whole, "--steps", STEPS, override)
        assert code == 1 and note in text and message in error


def test_changed_values_are_told(train, tmp_path, whole):
    code, text, _ = train(tmp_path / "run", "--steps", STEPS + 1, "--resume", whole, "lr=5e-4")
    assert code == 0 and "note: lr is now 0.0005, the checkpoint was trained with 0.001" in text
    assert "note: steps" not in text
    # of keys that are new with it nothing is to be told
    assert train(tmp_path / "speed", "--steps", 0, "scheduler.type=iddpm-speed")[0] == 0
    code, text, _ = train(tmp_path / "speed", "--steps", 1, "--resume", "auto")
    assert code == 0 and "note: scheduler.type is now 'iddpm', the checkpoint was trained with 'iddpm-speed'" in text


def test_kill_minus_9_costs_only_the_steps_since_the_checkpoint(train, train_together, tmp_path, whole):
    out = tmp_path / "run"
    # Step 6 has begun a checkpoint, so that of step 4 is written.
    fault = {"kind": "kill while saving", "rank": 0, "step": 8}
    (result,) = train_together(1, out, "--steps", STEPS, "ckpt_every=2", fault=fault)
    assert result["code"] == -signal.SIGKILL
    code, text, error = train(out, "--steps", STEPS, "--resume", "auto")
    assert code == 0, error
    assert int(re.search(r"after step (\d+)", text)[1]) in (4, 6)
    assert read_losses(out) == read_losses(whole)
    assert_same_weights(last(out), last(whole))


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(train, tmp_path, monkeypatch, whole):
    """That of step 2 gets its name when step 4 computes, and holds what a run of two steps would have."""
    out, ends = tmp_path / "run", tmp_path / "ends"
    step_4 = threading.Event()
    real_losses, real_rename = Trainer.compute_losses, os.rename
    renamed = []

    def compute_losses(self, batch, step):
        if step == 4:
            assert not renamed
            step_4.set()
            self.finish_saving()
            assert [path.name for path in renamed] == ["step-00000002"]
        return real_losses(self, batch, step)

    def rename(source, target):
        if Path(target).name.startswith("step-"):
            assert step_4.wait(60)
            renamed.append(Path(target))
        real_rename(source, target)

    monkeypatch.setattr(Trainer, "compute_losses", compute_losses)
    monkeypatch.setattr(os, "rename", rename)
    code, _, error = train(out, "--steps", 5, "ckpt_every=2", "keep_checkpoints=3")
    assert code == 0, error
    assert len(renamed) == 3
    monkeypatch.undo()
    assert read_losses(out) == read_losses(whole)[:5]
    assert train(ends, "--steps", 2)[0] == 0
    assert_same_weights(*(folder / "checkpoints" / "step-00000002" for folder in (out, ends)))


def test_the_next_checkpoint_waits_until_the_one_before_is_written(train, tmp_path, monkeypatch):
    """Its copy of the state takes the place of the one that is being written."""
    out, ends = tmp_path / "run", tmp_path / "ends"
    copied_again = threading.Event()
    real_snapshot, real_write = loop.take_snapshot, loop.write_state

    def take_snapshot(trainer, buffers):
        snapshot = real_snapshot(trainer, buffers)
        if trainer.position.step == 2:
            copied_again.set()
        return snapshot

    def write_state(*arguments):
        copied_again.wait(0.3)
        real_write(*arguments)

    monkeypatch.setattr(loop, "take_snapshot", take_snapshot)
    monkeypatch.setattr(loop, "write_state", write_state)
    assert train(out, "--steps", 2, "ckpt_every=1")[0] == 0
    monkeypatch.undo()
    assert train(ends, "--steps", 1)[0] == 0
    assert_same_weights(*(folder / "checkpoints" / "step-00000001" for folder in (out, ends)))


@pytest.mark.parametrize("moment", ["compute_losses", "save"])
def test_a_signal_that_comes_too_late_to_stop_a_run_is_no_failure(train, tmp_path, monkeypatch, moment):
    """In the last step, or in the checkpoint behind it."""
    real = getattr(Trainer, moment)

    def signalled(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, moment, signalled)
    code, text, error = train(tmp_path / "run", "--steps", 1)
    assert code == 0, error
    assert "stopped by signal" not in text
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_ctrl_c_while_the_batches_end_is_not_lost(tmp_path, shared):
    trainer = make_trainer(tmp_path / "run", steps=1)
    list_batches = trainer.batches

    def batches(epoch, consumed):
        try:
            yield from list_batches(epoch, consumed)
        finally:
            raise KeyboardInterrupt

    trainer.batches = lead(batches, SimpleNamespace(tell=lambda value: None)) if shared else batches
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def run_out_of_memory(losses):
    raise torch.OutOfMemoryError("tried to allocate more than there is")


def stop_by_signal(losses):
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c_twice(losses):
    # Not os.kill: another thread may get those, and two that come at once are one.
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def lose_numbers(losses):
    losses["loss"] = losses["loss"] * float("nan")


@pytest.mark.parametrize(
    ("happen", "code", "told", "finished"),
    [
        (lambda losses: None, 1, "opensora-fast: error: the checkpoint", 3),
        (run_out_of_memory, 1, "opensora-fast: error: step 3: out of GPU memory", 2),
        (lose_numbers, 1, "opensora-fast: error: step 3: the loss is nan", 2),
        (stop_by_signal, 1, "opensora-fast: error: the checkpoint", 3),
        (press_ctrl_c_twice, 130, "\nerror: the checkpoint", 2),
    ],
    ids=["nothing else", "out of memory", "not finite", "signal", "Ctrl-C twice"],
)
def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_is_told_whatever_else_stops_it(
    train, tmp_path, monkeypatch, happen, code, told, finished
):
    step_3 = threading.Event()

    def save_file(*arguments):
        assert step_3.wait(60)  # else the loop may hear of it before that step
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", save_file)
    real = Trainer.compute_losses

    def compute_losses(self, batch, step):
        losses = real(self, batch, step)
        if step == 3:
            step_3.set()
            while self.background.is_busy:
                time.sleep(0.01)
            happen(losses)
        return losses

    monkeypatch.setattr(Trainer, "compute_losses", compute_losses)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell; here it may be ignored
    try:
        ended, _, error = train(tmp_path / "run", "--steps", 9, "ckpt_every=2")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == code and told in error and "Traceback" not in error
    assert error.count("step-00000002 could not be written: [Errno 28] No space left on device") == 1, error
    assert len(read_losses(tmp_path / "run")) == finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(train, tmp_path, monkeypatch, whole, number):
    out = tmp_path / "run"
    real = Trainer.compute_losses

    def interrupted(self, batch, step):
        if step == 3:
            os.kill(os.getpid(), number)
        return real(self, batch, step)

    monkeypatch.setattr(Trainer, "compute_losses", interrupted)
    code, text, error = train(out, "--steps", STEPS)
    assert code == 128 + number, error
    assert "--resume auto continues" in text
    assert [row[0] for row in read_losses(out)] == [1, 2, 3]
    monkeypatch.undo()
    assert train(out, "--steps", STEPS, "--resume", "auto")[0] == 0
    assert read_losses(out) == read_losses(whole)


def test_a_signal_that_comes_behind_a_step_costs_no_further_one(train, tmp_path, monkeypatch):
    real = loop.take_snapshot

    def take_snapshot(trainer, buffers):
        if trainer.position.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(trainer, buffers)

    monkeypatch.setattr(loop, "take_snapshot", take_snapshot)
    assert train(tmp_path / "run", "--steps", STEPS, "ckpt_every=2")[0] == 128 + signal.SIGTERM
    assert [row[0] for row in read_losses(tmp_path / "run")] == [1, 2]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_can_be_replayed(train, tmp_path, capsys):
    out = tmp_path / "run"
    code, _, error = train(out, "--steps", 5, "lr=1e25", "grad_clip=None", "--kernels", "reference")
    assert code == 1
    report = json.loads((out / "nonfinite.json").read_text())
    step = report["step"]
    assert re.search(rf"step {step}: the (loss|gradient norm) is (nan|inf)", error), error
    (batch,) = report["batches"]
    assert f"bucket {tuple(batch['bucket'])}, rows {', '.join(map(str, batch['rows']))}" in error
    assert "Traceback" not in error
    assert len(read_losses(out)) == step - 1
    checkpoint = out / "checkpoints" / f"step-{step - 1:08d}"
    assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "model" / "model.safetensors").values())
    assert report["replay"] in error and report["replay"].endswith(" --kernels reference")
    capsys.readouterr()
    assert cli.run(shlex.split(report["replay"])[1:]) == 1
    replayed = json.loads((tmp_path / f"run-replay-{step}" / "nonfinite.json").read_text())
    for key in ("step", "what", "batches"):
        assert replayed[key] == report[key]
    assert batch["rank"] == 0 and batch["value"] in ("nan", "inf") and len(batch["texts"]) == len(batch["rows"])


def test_a_report_that_cannot_be_written_does_not_hide_what_is_not_finite(train, tmp_path, monkeypatch):
    real = Trainer.compute_losses

    def faulty(self, batch, step):
        losses = real(self, batch, step)
        lose_numbers(losses)
        return losses

    monkeypatch.setattr(Trainer, "compute_losses", faulty)
    (tmp_path / "run" / "nonfinite.json").mkdir(parents=True)
    code, _, error = train(tmp_path / "run", "--steps", 1)
    assert code == 1 and "error: step 1: the loss is nan" in error and "To run this step again:" in error
    assert "nonfinite.json could not be written: [Errno 21] Is a directory" in error


def test_a_state_that_cannot_be_copied_does_not_hide_what_is_not_finite(train, tmp_path, monkeypatch):
    def run_out_of_pinned_memory(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loop, "take_snapshot", run_out_of_pinned_memory)
    code, _, error = train(tmp_path / "run", "--steps", 5, "lr=1e25", "grad_clip=None")
    assert code == 1 and re.search(r"error: step \d: the (loss|gradient norm) is (nan|inf)\. Batch:", error), error
    assert "\nand CUDA error: out of memory" in error


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_state_before_it(train, tmp_path, monkeypatch, whole, where):
    """The checkpoint is exactly that of the step before, so a resume without the fault is a run without the fault."""
    out = tmp_path / "run"
    real = Trainer.compute_losses

    def faulty(self, batch, step):
        losses = real(self, batch, step)
        if step == 5:
            # 0 * sqrt'(0) has the value 0 and the gradient nan; infinity has a gradient of 0
            zero = torch.sqrt((self.model.final_layer.linear.bias.sum() * 0).abs()) * 0
            losses["loss"] = losses["loss"] + (zero if where == "gradient" else float("inf"))
        return losses

    monkeypatch.setattr(Trainer, "compute_losses", faulty)
    code, _, error = train(out, "--steps", STEPS, "ckpt_every=5")  # of that step there is none all the same
    assert code == 1 and f"step 5: the {'loss is inf' if where == 'loss' else 'gradient norm is nan'}" in error
    assert [row[0] for row in read_losses(out)] == [1, 2, 3, 4]
    # A whole checkpoint of that step is left alone: replacing it would leave none to a kill in the middle.
    folder = out / "checkpoints" / "step-00000004"
    written = folder.stat().st_ino
    for resume in ("auto", folder.resolve()):
        code, _, error = train(out, "--steps", STEPS, "--resume", resume)
        assert code == 1 and "step 5: the" in error
        assert folder.stat().st_ino == written
    monkeypatch.undo()
    assert train(out, "--steps", STEPS, "--resume", "auto")[0] == 0
    assert read_losses(out) == read_losses(whole)
    assert_same_weights(last(out), last(whole))
