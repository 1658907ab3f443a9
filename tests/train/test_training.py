"""A whole run of a tiny model: what it writes, what it learns, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from losses import read_losses
from safetensors.torch import load_file
from toy_steps import make_trainer

from opensora_fast.config import load_train_config
from opensora_fast.model import STDiT2
from opensora_fast.train import loop
from opensora_fast.train.checkpoints.state import Position
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.monitoring.metrics import read_metrics
from opensora_fast.train.train import count_steps_left


def test_a_run_writes_what_it_promises(train, tmp_path):
    out = tmp_path / "run"
    begun = time.perf_counter()
    code, text, error = train(out, "--steps", 8, "ckpt_every=3")
    seconds = time.perf_counter() - begun
    assert code == 0, error
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert sum(row["step_time"] for row in rows) < seconds
    needed = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time", "data_wait", "bucket", "memory"}
    for row in rows:
        assert needed <= set(row)
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["lr"] == 1e-3 and row["memory"] > 0
        assert row["memory_retries"] == 0  # a host has none
        clips, frames = (1, 4) if row["bucket"][1] == 4 else (2, row["bucket"][1])
        assert row["tokens"] == clips * frames * 9 * 16  # latents of 18 x 32 in patches of 2 x 2
        assert 0 <= row["data_wait"] <= row["step_time"]
    assert {row["bucket"][1] for row in rows} == {1, 2, 4}
    assert [row["epoch"] for row in rows] == [0] * 6 + [1] * 2
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000006", "step-00000008"]
    checkpoint = out / "checkpoints" / "step-00000008"
    for name in ("model", "ema"):
        model = STDiT2.from_pretrained(checkpoint / name)
        assert model.config.hidden_size == 48 and model.config.model_max_length == 16
    assert (checkpoint / "encoders" / "vae" / "config.json").is_file()
    assert json.loads((checkpoint / "state.json").read_text())["sampler"] == {"seed": 42, "epoch": 1, "consumed": 2}
    written = json.loads((out / "config.json").read_text())
    assert written["model"]["depth"] == 1 and written["steps"] == 8 and written["dataset"]["data_path"].startswith("/")
    ops = {row["op"]: row["backend"] for row in json.loads((out / "kernels.json").read_text())}
    assert ops["spatial_attention"] == "reference" and "spatial_attention (reference" in text
    assert "train" in error and "loss" in error  # progress
    assert not (out / "bad_clips.jsonl").exists() or (out / "bad_clips.jsonl").read_text() == ""


def test_no_clip_is_held_beside_the_activations(train, tmp_path, monkeypatch):
    decoded = []
    prepare, compute = ModelInputs.prepare, loop.compute_losses

    def encode(self, batch):
        decoded.append(weakref.ref(batch.video))
        return prepare(self, batch)

    def compute_forward(*arguments):
        assert not any(clips() is not None for clips in decoded)
        return compute(*arguments)

    monkeypatch.setattr(ModelInputs, "prepare", encode)
    monkeypatch.setattr(loop, "compute_losses", compute_forward)
    code, _, error = train(tmp_path / "run", "--steps", 3)
    assert code == 0, error
    assert len(decoded) == 3


def test_average_follows_the_weights(train, tmp_path):
    """The average in the checkpoint is that of Open-Sora's formula over the weights of every step."""
    average = None
    for step in range(4):
        out = tmp_path / str(step)
        assert train(out, "--steps", step)[0] == 0
        folder = out / "checkpoints" / f"step-{step:08d}"
        weights = load_file(folder / "model" / "model.safetensors")
        if average is None:
            average = {name: value.clone() for name, value in weights.items()}
        else:
            for name, value in average.items():
                value.mul_(0.9).add_(weights[name], alpha=1 - 0.9)
        stored = load_file(folder / "ema" / "model.safetensors")
        for name, value in average.items():
            if name in ("rope.freqs", "y_embedder.y_embedding"):  # not trained
                assert torch.equal(stored[name], weights[name])
            else:
                assert torch.equal(stored[name], value), (step, name)


def test_cpu_threads_are_those_of_the_configuration_during_the_run_only(train, tmp_path, monkeypatch):
    threads = []
    real = STDiT2.forward

    def record(self, *arguments, **conditions):
        threads.append(torch.get_num_threads())
        return real(self, *arguments, **conditions)

    monkeypatch.setattr(STDiT2, "forward", record)
    before = torch.get_num_threads()
    assert train(tmp_path / "run", "--steps", 1, f"cpu_threads={before + 1}")[0] == 0
    assert threads == [before + 1] and torch.get_num_threads() == before


def test_captions_are_encoded_in_float32_when_the_model_computes_in_bfloat16(train, tmp_path, monkeypatch):
    dtypes = []
    real = STDiT2.forward

    def record(self, x, timestep, y, *arguments, **conditions):
        dtypes.append((y.dtype, next(self.parameters()).dtype))
        return real(self, x, timestep, y, *arguments, **conditions)

    monkeypatch.setattr(STDiT2, "forward", record)
    assert train(tmp_path / "run", "--steps", 1, "dtype=bf16")[0] == 0
    assert dtypes == [(torch.float32, torch.bfloat16)]


def test_what_the_model_is_told(train, tmp_path, monkeypatch):
    calls = []
    real = STDiT2.forward

    def record(self, x, timestep, **conditions):
        calls.append((x, timestep, conditions))
        return real(self, x, timestep, **conditions)

    monkeypatch.setattr(STDiT2, "forward", record)
    assert train(tmp_path / "run", "--steps", 24, "mask_ratios={'mask_no': 0.5, 'mask_image_head': 0.5}")[0] == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    masked = 0
    for (x, timestep, told), row in zip(calls, rows, strict=True):
        clips, frames = row["batch_size"], row["bucket"][1]
        assert x.shape == (clips, 4, frames, 18, 32) and x.dtype == torch.float32
        assert timestep.shape == (clips,) and 0 <= int(timestep.min()) and int(timestep.max()) < 1000
        assert told["y"].shape == (clips, 1, 16, 32) and told["mask"].shape == (clips, 16)
        assert told["dropped"].shape == (clips,)  # captions, as in training only
        expected = {
            "num_frames": frames,
            "height": 144,
            "width": 256,
            "ar": 256 / 144,
            "fps": 120 if frames == 1 else 8,
        }
        for name, value in expected.items():
            assert told[name].tolist() == pytest.approx([value] * clips), name
        if told.get("x_mask") is not None:
            masked += 1
            assert frames > 1 and told["x_mask"].shape == (clips, frames)
            assert told["x_mask"][:, 1:].all() and not told["x_mask"][:, 0].all()
    assert masked > 4
    assert len({int(timestep[0]) for _, timestep, _ in calls}) > 20


def test_the_loss_falls(train, tmp_path):
    out = tmp_path / "run"
    more = ["bucket_config={'144p': {1: (1.0, 4)}}", "mask_ratios=None", "lr=5e-3"]
    assert train(out, "--steps", 40, *more)[0] == 0
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_losses(train, tmp_path, dtype):
    for name, more in (("a", []), ("b", ["prefetch=3", "num_workers=2"]), ("c", ["seed=43"])):
        assert train(tmp_path / name, "--steps", 5, f"dtype={dtype}", *more)[0] == 0
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")
    assert read_losses(tmp_path / "a") != read_losses(tmp_path / "c")


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler=dict(type='iddpm-speed')"],
        ["mask_ratios=None"],
        ["grad_checkpoint=True", "model.depth=2"],
        ["grad_checkpoint=1", "model.depth=2"],
        ["grad_clip=None"],
        ["model.freeze=not_temporal"],
        ["drop_last=False", "bucket_config.144p.2=(1.0, 3)"],
        ["decoder=pyav", "dtype=bf16"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_options(train, tmp_path, overrides):
    code, _, error = train(tmp_path / "run", "--steps", 3, *overrides)
    assert code == 0, error
    assert len(read_losses(tmp_path / "run")) == 3


def test_recomputing_activations_changes_nothing(train, tmp_path):
    for name, blocks in (("a", 0), ("b", 1), ("c", 2)):
        assert train(tmp_path / name, "--steps", 4, "model.depth=2", f"grad_checkpoint={blocks}")[0] == 0
    called = [json.loads((tmp_path / name / "kernels.json").read_text()) for name in "abc"]
    calls = [{row["op"]: row["calls"] for row in rows}["spatial_attention"] for rows in called]
    assert [number - calls[0] for number in calls] == [0, 4, 8]  # one more for each block that recomputes, and step
    losses = [[row[1] for row in read_losses(tmp_path / name)] for name in "abc"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_epochs_end_the_run_where_there_are_no_steps(train, tmp_path):
    out = tmp_path / "runs" / "first"  # neither folder is there yet
    assert train(out, "epochs=2")[0] == 0
    assert [row[6] for row in read_losses(out)] == [0] * 6 + [1] * 6


def test_progress_counts_to_what_ends_the_run(train, config, table, tmp_path):
    """An epoch has 6 steps."""
    out = tmp_path / "run"
    assert "train: 5 steps ..." in train(out, "--steps", 5, "epochs=2")[2]
    error = train(out, "--steps", 20, "epochs=2", "--resume", "auto")[2]
    assert "train: 7 steps ..." in error and "train: 7/7 steps" in error

    def count(*overrides):
        loaded = load_train_config(config, overrides, {"dataset.data_path": str(table)}).config
        return count_steps_left(loaded, read_data(loaded), Position(step=1, consumed=1))

    assert count("epochs=2") == 11 and count("steps=9") == 8 and count("steps=1") == 0
    draws = "bucket_config={'144p': {1: (0.9, 2), 2: (1.0, 2), 4: (1.0, 1)}}"
    assert count(draws, "epochs=2") is None and count(draws, "epochs=2", "steps=20") is None
    assert count(draws, "epochs=100", "steps=20") == 19


def test_only_many_epochs_in_a_row_without_a_batch_are_a_mistake(tmp_path):
    def run(name, epochs_with_batches):
        trainer = make_trainer(tmp_path / name, 15)  # an epoch has 10
        batches, trainer.limits.epochs = trainer.batches, 1000
        trainer.batches = lambda epoch, consumed: batches(epoch, consumed) if epoch in epochs_with_batches else iter(())
        trainer.run()
        return trainer.position.step

    assert run("two", {50, 150}) == 15
    with pytest.raises(ValueError, match="100 epochs in a row have no batch: raise the keep probabilities"):
        run("one more between", {50, 151})


def test_init_from_a_run_takes_weights_and_encoder_but_not_the_position(train, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "--steps", 4)[0] == 0
    code, text, error = train(second, "--steps", 0, "--init-from", first, "seed=7")
    assert code == 0, error
    assert "step-00000004" in text
    old = load_file(first / "checkpoints" / "step-00000004" / "model" / "model.safetensors")
    new = load_file(second / "checkpoints" / "step-00000000" / "model" / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    fitted = "encoders/vae/linear_autoencoder.safetensors"
    assert (first / fitted).read_bytes() == (second / fitted).read_bytes()
    # so do the folder of its checkpoints, and a model's folder or file in one of them
    average = first / "checkpoints/step-00000004/ema"
    others = "bucket_config={'144p': {1: (1.0, 2)}}"
    for number, start in enumerate([first / "checkpoints", average, average / "model.safetensors"]):
        out = tmp_path / f"from-{number}"
        code, _, error = train(out, "--steps", 0, "--init-from", start, others)
        assert code == 0, error
        assert (first / fitted).read_bytes() == (out / fitted).read_bytes()
    code, _, error = train(tmp_path / "fourth", "--steps", 0, "--init-from", first, "model.depth=2")
    assert code == 1 and error.endswith("more. They were trained with depth=1, here 2\n")


def leave_autoencoder(train, folder):
    """As of a run that failed before its first step; it was fitted on other clips than those of the table."""
    other = folder.with_name("other")
    assert train(other, "--steps", 0, "bucket_config={'144p': {1: (1.0, 2)}}")[0] == 0
    shutil.copytree(other / "encoders", folder / "encoders")
    return folder / "encoders" / "vae"


def test_weights_are_not_continued_with_another_autoencoder_than_theirs(train, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "--steps", 1)[0] == 0
    left = leave_autoencoder(train, second)
    code, _, error = train(second, "--steps", 2, "--resume", first)
    assert code == 1 and f"{left} is not the linear autoencoder that {first}" in error and "remove it" in error
    shutil.rmtree(left)
    assert train(second, "--steps", 2, "--resume", first)[0] == 0


@pytest.mark.parametrize("start", [(), ("--init-from",)])
def test_a_new_run_does_not_take_the_autoencoder_that_one_without_a_step_has_left(train, tmp_path, start):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "--steps", 1)[0] == 0
    left = leave_autoencoder(train, second)
    code, output, error = train(second, "--steps", 1, *start, *([first] if start else []))
    assert code == 0, error
    assert f"{left}, left by a run without a step, is not used, but removed" in output
    fitted = "encoders/vae/linear_autoencoder.safetensors"
    assert (second / fitted).read_bytes() == (first / fitted).read_bytes()


@pytest.mark.parametrize("start", ["--init-from", "--resume", None])
def test_a_run_in_the_folder_of_a_checkpoint_is_refused_and_leaves_it_as_it_is(train, tmp_path, start):
    assert train(tmp_path / "run", "--steps", 1)[0] == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    code, _, error = train(checkpoint, "--steps", 2, *([start, checkpoint] if start else []))
    assert code == 1 and f"{checkpoint} is a checkpoint, in which a run would spoil it: give another --out" in error
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("start", ["--init-from", "--resume"])
def test_a_checkpoint_does_not_hold_an_autoencoder_that_its_run_has_not_used(train, tmp_path, start):
    """Sampling from it would take that one."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "--steps", 1)[0] == 0
    vae = f"vae.from_pretrained={shutil.copytree(first / 'encoders' / 'vae', tmp_path / 'vae')}"
    for out in [second, first] if start == "--resume" else [second]:
        code, _, error = train(out, "--steps", 2, start, first, vae)
        assert code == 0, error
        assert not (out / "checkpoints" / "step-00000002" / "encoders").exists()


def test_other_files_in_the_place_of_the_autoencoder_are_not_removed(train, tmp_path):
    other = tmp_path / "run" / "encoders" / "vae" / "diffusion_pytorch_model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"weights of Stable Diffusion's")
    code, _, error = train(tmp_path / "run", "--steps", 0)
    assert code == 1 and str(other.parent) in error
    assert other.exists()


def test_a_folder_that_another_run_writes_into_is_refused_and_left_as_it_is(train, tmp_path):
    """What the other run writes meanwhile may look like a damaged checkpoint, which a resumed run would set aside."""
    out = tmp_path / "run"
    assert train(out, "--steps", 0)[0] == 0
    (out / "checkpoints" / "step-00000001").mkdir()
    before = sorted(out.rglob("*"))
    code = "import sys, pathlib; from opensora_fast.folder_lock import hold_folder\n"
    code += f"with hold_folder(pathlib.Path({str(out)!r}), print): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        status, _, error = train(out, "--steps", 0, "--resume", "auto")
        assert status == 1 and f"another run is writing into {out} (process {other.pid} on " in error
        assert sorted(out.rglob("*")) == before
        other.kill()
    assert train(out, "--steps", 0, "--resume", "auto")[0] == 0
    assert (out / "checkpoints" / "damaged-step-00000001").is_dir()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "kernels.json"])
def test_a_file_that_a_full_disk_does_not_take_is_named_and_stays_as_it_was(train, tmp_path, monkeypatch, name):
    out = tmp_path / "run"
    assert train(out, "--steps", 1)[0] == 0
    before = (out / name).read_bytes()
    real = Path.write_text

    def write_text(path, *arguments, **options):
        if path.parent == out and name in path.name:
            real(path, "a part")
            raise OSError(28, "No space left on device")  # as the system raises it, without a name
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    code, _, error = train(out, "--steps", 2, "--resume", "auto", "lr=1e-4")
    assert code == 1 and f"No space left on device: {out / name}" in error
    assert (out / name).read_bytes().startswith(before) and not list(out.glob("*.part"))


def test_a_lock_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")
    code, _, error = train(tmp_path, "--steps", 0)
    assert code == 1 and error.rstrip().endswith(f": {tmp_path / '.lock'}")


def test_dry_run_prints_and_writes_nothing(train, tmp_path):
    out = tmp_path / "run"
    code, text, _ = train(out, "--steps", 5, "--dry-run", "lr=2e-3")
    assert code == 0
    assert "0.002  [command line]" in text and "[tiny.py:" in text and "steps" in text
    assert "144p, 4 frame" in text and "6 steps of 1 micro-batch" in text
    assert not out.exists()


def test_dry_run_without_a_table_shows_the_configured_buckets(capsys):
    from opensora_fast import cli

    assert cli.run(["train", "stage3", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "720p, 32 frame" in text and "no table of clips is given" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["modle.depth=2"], r"modle: unknown key; did you mean 'model'\?"),
        (["bucket_config.144q={1: (1.0, 2)}"], "144q"),
        (["bucket_config.144p.1=(1.5, 2)"], "144p"),
        (["bucket_config.144p.1=(1.0, None)"], "144p"),
        (["bucket_config.144p.1=(1.0, (2, 4))"], "144p"),
        (["bucket_config={'144p': {1: (1.0, 50)}}"], r"no micro-batch from 10 clips(.|\n)*144p, 1 frame"),
        (["bucket_config.144p.1=(1.0, 50)"], r"zero batches(.|\n)*\['144p'\]\[1\]: 4 clips, batch size 50"),
        (["bucket_config={'720p': {16: (1.0, 1)}}"], "no micro-batch from 10 clips"),
        (["--data-path", "/nowhere/meta.csv"], "/nowhere/meta.csv"),
        (["--init-from", "/nowhere/model"], "/nowhere/model"),
        (["--resume", "/nowhere/run"], "/nowhere/run: no such folder"),
        (["--resume", ""], '--resume "": name a checkpoint'),
        (["load=/nowhere/run"], "/nowhere/run: no such folder"),
        (["--device", "tpu"], "tpu"),
        (["--resume", "/nowhere", "--init-from", "/nowhere"], "give one of them"),
        (["load=/nowhere", "--init-from", "/nowhere"], "--init-from and `load` .* both name weights .*: give one"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_one_message_and_leave_no_folder(train, tmp_path, more, message):
    import re

    out = tmp_path / "run"
    for dry in ([], ["--dry-run"]):
        code, _, error = train(out, "--steps", 2, *more, *dry)
        assert code == 1
        assert re.search(message, error), error
        assert "Traceback" not in error and "unexpected" not in error
        assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["vae.from_pretrained=/nowhere/vae"], "/nowhere/vae"),
        (["vae.from_pretrained=nowhere"], "nowhere/"),
        (["vae=dict(type='VideoAutoencoderKL', from_pretrained='./nowhere')"], "there is no folder nowhere; put"),
        (["vae=dict(type='VideoAutoencoderKL')"], "vae.from_pretrained is missing"),
        (["text_encoder=dict(type='t5', from_pretrained='{config}')"], "tiny.py is a file; give the folder"),
        (["text_encoder=dict(type='t5')"], "text_encoder.from_pretrained is missing"),
        (
            ["text_encoder=dict(type='t5', from_pretrained='a/b', local_files_only=True, cache_dir='{config}s')"],
            "lacks every file. local_files_only=True forbids a download",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_encoders_that_are_not_there_are_one_message(train, tmp_path, config, more, message):
    more = [text.format(config=config) for text in more]
    code, _, told = train(tmp_path / "run", "--steps", 2, *more, "--dry-run")
    assert code == 1 and message in told and "unexpected" not in told
    assert not (tmp_path / "run").exists()
    code, _, error = train(tmp_path / "run", "--steps", 2, *more)
    assert code == 1 and told in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.hidden_size=100"], "hidden_size 100"),
        (["model.drop_path=0.1"], "drop_path"),
        (["grad_checkpoint=9"], "grad_checkpoint=9, but the model has"),
        (["scheduler.learn_sigma=False"], "learn_sigma"),
        (["scheduler.noise_schedule=cosin"], "cosin"),
        (["--kernels", "cuda"], "--kernels cuda: unknown; choose one of auto"),
        (["--linear", "cutlass"], "--linear cutlass: unknown; choose one of torch, quack"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_built_is_known_before_any_encoder(train, tmp_path, more, message):
    for dry in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 2, *more, *dry)
        assert code == 1 and message in error
        assert not (tmp_path / "run").exists()


def test_dry_run_refuses_the_start_that_the_run_would_and_changes_nothing(train, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(run, "--steps", 2, "ckpt_every=1")[0] == 0
    assert train(other, "--steps", 1, "bucket_config={'144p': {1: (1.0, 2)}}")[0] == 0
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()  # damaged, so that `auto` passes it over

    def list_files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    checkpoint = run / "checkpoints" / "step-00000001"
    for out, more, message in (
        (run, [], "holds a run already: add --resume auto"),
        (checkpoint, [], "is a checkpoint, in which a run would spoil it"),
        (run / "metrics.jsonl", [], "metrics.jsonl is a file: give a folder"),
        (run / "metrics.jsonl" / "new", [], "metrics.jsonl is a file: give a folder"),
        (run, ["--resume", "auto", "seed=7"], "was written with seed=42, and it is now 7"),
        (run, ["--resume", "auto", "drop_last=False"], "was written with another table of clips"),
        (tmp_path / "new", ["--resume", run, f"features={tmp_path / 'f'}"], "was written with clips, not features"),
        (tmp_path / "new", [f"load={other}"], "was written with another table of clips"),
    ):
        before = list_files()
        code, _, told = train(out, "--steps", 2, *more, "--dry-run")
        assert code == 1 and message in told
        assert list_files() == before
        code, _, error = train(out, "--steps", 2, *more)
        assert code == 1 and error == told


@pytest.mark.parametrize("weights", ["/nowhere/model", "nowhere.pth", "nowhere", ""])
def test_weights_to_start_from_are_looked_for_before_anything_is_made(train, tmp_path, weights):
    """An empty name is that of a shell's variable that is not set, and no wish to start from nothing."""
    from_file = [f"model.from_pretrained={weights or repr(weights)}"]
    for name, start in (("--init-from", ["--init-from", weights]), ("model.from_pretrained", from_file)):
        code, _, error = train(tmp_path / "run", "--steps", 0, *start)
        what = f": there is no file or folder {weights}; give a file or folder of weights, or a hub id such as "
        assert code == 1 and error.startswith(f"opensora-fast: error: {name}{what if weights else ' is missing: '}")
        assert not (tmp_path / "run").exists()


def test_clips_too_few_for_a_batch_may_be_left_out_on_demand(train, tmp_path):
    code, text, error = train(
        tmp_path / "run", "--steps", 2, "bucket_config.144p.1=(1.0, 50)", "allow_empty_buckets=True"
    )
    assert code == 0, error
    assert "warning: 144p, 1 frame: batch size 50 is more than the clips" in text


def test_a_run_is_not_written_over(train, tmp_path):
    assert train(tmp_path / "run", "--steps", 1)[0] == 0
    rows = tmp_path / "run" / "metrics.jsonl"
    checkpoints = tmp_path / "run" / "checkpoints"
    for away in (None, checkpoints, rows):  # each of them alone is a run, too
        aside = away and away.rename(tmp_path / "aside")
        code, _, error = train(tmp_path / "run", "--steps", 1)
        assert code == 1 and "holds a run already: add --resume auto" in error
        if away is not None:
            aside.rename(away)


def test_out_is_needed(config, capsys):
    from opensora_fast import cli

    assert cli.run(["train", str(config)]) == 1
    assert "--out is missing" in capsys.readouterr().err
    assert cli.run(["train", str(config), "--out", "/tmp/x"]) == 1
    assert "dataset.data_path is missing: add --data-path META" in capsys.readouterr().err


def test_half_of_what_torchrun_sets_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = train(tmp_path / "run", "--steps", 1)
    assert code == 1 and "WORLD_SIZE=2 is set, but not RANK, LOCAL_RANK" in error and "torchrun" in error
    assert not (tmp_path / "run").exists()


def test_a_configuration_is_never_executed(train, tmp_path):
    marker = tmp_path / "marker"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\nseed = pathlib.Path({str(marker)!r}).touch()\n")
    code, _, error = train(tmp_path / "run", config=evil)
    assert code == 1 and "evil.py, line 1" in error
    assert not marker.exists() and not (tmp_path / "run").exists()
