"""Clips that cannot be used, and weights that a run starts from."""

import json
import re
import shutil

import torch
from losses import read_losses
from safetensors.torch import load_file

from opensora_fast.data.bad_clips import read_bad_clips
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.train import describe_replay


def test_a_corrupt_clip_costs_one_clip(train, tmp_path, table):
    folder = tmp_path / "clips"
    shutil.copytree(table.parent, folder)
    (folder / "4.mp4").write_bytes((folder / "4.mp4").read_bytes()[:300])
    (folder / "5.mp4").write_bytes(b"no video")
    for name in ("a", "b"):
        out = tmp_path / name
        code, _, error = train(out, "--steps", 8, "--data-path", folder / "meta.csv")
        assert code == 0, error
        assert "4.mp4" in error and "5.mp4" in error
        bad = read_bad_clips(out / "bad_clips.jsonl")
        assert {clip["row"] for clip in bad} == {4, 5}
        assert all(clip["path"].endswith(f"{clip['row']}.mp4") and clip["reason"] for clip in bad)
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")


def test_a_list_of_bad_clips_that_a_full_disk_does_not_take_is_named(train, tmp_path, table):
    folder, out = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(table.parent, folder)
    (folder / "5.mp4").write_bytes(b"no video")
    out.mkdir()
    (out / "bad_clips.jsonl").symlink_to("/dev/full")
    code, _, error = train(out, "--steps", 8, "--data-path", folder / "meta.csv")
    assert code == 1 and f"No space left on device: {out / 'bad_clips.jsonl'}" in error


def test_a_bucket_without_one_usable_clip_does_not_stop_the_run(train, tmp_path, table):
    folder = tmp_path / "clips"
    shutil.copytree(table.parent, folder)
    for number in range(4, 8):
        (folder / f"{number}.mp4").write_bytes(b"")
    arguments = ("--data-path", folder / "meta.csv")
    code, _, error = train(tmp_path / "whole", "--steps", 8, *arguments)
    assert code == 0, error
    assert re.search(r"[4-7]\.mp4: empty file; and bucket 144p, 2, .* has no further clip .* is of bucket", error)
    losses = read_losses(tmp_path / "whole")
    assert [row[0] for row in losses] == list(range(1, 9)) and not any(row[5][1] == 2 for row in losses)
    for steps in (3, 8):
        assert train(tmp_path / "run", "--steps", steps, "--resume", "auto", *arguments)[0] == 0
    assert read_losses(tmp_path / "run") == losses
    for path in (*folder.glob("*.mp4"), *folder.glob("*.png")):
        path.write_bytes(b"")
    vae = f"vae.from_pretrained={tmp_path / 'whole' / 'encoders' / 'vae'}"
    for more in ((), (f"features={tmp_path / 'features'}",)):
        code, _, error = train(tmp_path / f"nothing-{len(more)}", "--steps", 8, *arguments, vae, *more)
        assert code == 1 and "empty file" in error and "nor could other buckets be used" in error
        assert "unexpected" not in error


def test_open_sora_weights_as_a_start_are_reported(train, tmp_path):
    """A `.pth` file of an older model: what fits is loaded and the rest listed; one that hardly fits is refused."""
    first = tmp_path / "first"
    assert train(first, "--steps", 2)[0] == 0
    state = load_file(first / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    old = {key: value for key, value in state.items() if "attn_temp" not in key} | {"pos_embed": torch.zeros(1)}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    code, text, error = train(tmp_path / "second", "--steps", 0, "--init-from", tmp_path / "old.pth")
    assert code == 0, error
    assert "start from" in text and "attn_temp" in text and "pos_embed left out" in text
    new = load_file(tmp_path / "second" / "checkpoints" / "step-00000000" / "model" / "model.safetensors")
    assert torch.equal(new["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    torch.save({"state_dict": {"other": torch.zeros(3)}}, tmp_path / "other.pth")
    code, _, error = train(tmp_path / "third", "--steps", 0, "--init-from", tmp_path / "other.pth")
    assert code == 1 and "other.pth" in error


def test_from_pretrained_of_the_configuration_is_a_start(train, tmp_path):
    first = tmp_path / "first"
    assert train(first, "--steps", 1)[0] == 0
    average = first / "checkpoints" / "step-00000001" / "ema"
    assert train(tmp_path / "second", "--steps", 0, f"model.from_pretrained={average}")[0] == 0
    a = load_file(average / "model.safetensors")
    b = load_file(tmp_path / "second" / "checkpoints" / "step-00000000" / "model" / "model.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)
    stored = json.loads((tmp_path / "second" / "config.json").read_text())
    assert stored["model"]["from_pretrained"] == str(average)


def test_weights_to_start_from_are_said_to_be_unread_where_a_checkpoint_is_continued(train, tmp_path):
    """A scheduler repeats the command that began the run."""
    out = tmp_path / "run"
    start = ("--resume", "auto", "--init-from", tmp_path / "old.pth")
    assert train(out, "--steps", 1, *start[:2])[0] == 0
    code, text, error = train(out, "--steps", 2, *start)
    assert code == 0, error
    newest = out / "checkpoints" / "step-00000001"
    assert f"note: the run continues from {newest}; --init-from {tmp_path / 'old.pth'} was not read" in text
    assert "--init-from" not in train(out, "--steps", 3, *start[:2])[1]


def test_load_of_the_configuration_is_said_to_be_unread_where_another_checkpoint_is_continued(train, tmp_path):
    """The configuration that began the run with the state of another stays as it is."""
    other, out = tmp_path / "other", tmp_path / "run"
    assert train(other, "--steps", 1)[0] == 0
    assert train(out, "--steps", 1, f"load={other}", "start_from_scratch=True")[0] == 0
    newest = out / "checkpoints" / "step-00000001"
    for resume in (newest, "auto"):
        code, text, error = train(out, "--steps", 1, "--resume", resume, f"load={other}")
        assert code == 0, error
        assert f"note: the run continues from {newest}; load={other} was not read" in text


def test_what_computes_is_checked_before_anything_is_made(train, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "run"
    for dry in ([], ["--dry-run"]):
        code, _, error = train(out, "--linear", "quack", *dry)
        assert code == 1
        assert "linear: quack needs a CUDA GPU, and the tokens are on cpu; name 'torch' in its place" in error
        code, _, error = train(out, "--kernels", "triton", *dry)
        assert code == 1 and "--kernels triton: Triton kernels need CUDA tensors, got cpu; use 'reference'" in error
    assert not out.exists()


def test_a_replay_computes_with_what_the_run_did(tmp_path):
    def describe(**chosen):
        return describe_replay(tmp_path, tmp_path, 5, Processes(torch.device("cpu")), **chosen)

    assert "--linear" not in describe() and "--kernels" not in describe()
    assert describe(linear="quack").endswith(" --linear quack")
    assert describe(backend="reference").endswith(" --kernels reference")
