"""Training from cached features: the numbers of training from clips, without decoder and encoders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from losses import read_losses
from safetensors import SafetensorError
from safetensors.torch import load_file

from opensora_fast.data.feature_store import FeatureWriter
from opensora_fast.model import STDiT2
from opensora_fast.train.inputs import encoders, sources
from opensora_fast.train.loop import Trainer

FITTED = "encoders/vae/linear_autoencoder.safetensors"


def test_features_are_written_once_and_give_the_losses_of_the_clips(train, tmp_path, monkeypatch):
    """In the first `feature_draws` epochs the same clips, frames, order and random numbers: equal bit for bit."""
    clips, cached, again = tmp_path / "clips", tmp_path / "cached", tmp_path / "again"
    folder = tmp_path / "features"
    buckets = ["drop_last=False", "bucket_config={'144p': {1: (1.0, 4), 2: (1.0, 4)}}"]  # 3 batches an epoch
    assert train(clips, "--steps", 6, *buckets)[0] == 0
    more = ["--steps", 8, *buckets, f"features={folder}", "feature_draws=2"]
    code, text, error = train(cached, *more)
    assert code == 0, error
    assert read_losses(cached)[:6] == read_losses(clips)
    assert {row[6] for row in read_losses(cached)} == {0, 1, 2}
    assert (cached / FITTED).read_bytes() == (clips / FITTED).read_bytes() == (folder / FITTED).read_bytes()

    def forbidden(*arguments, **options):
        raise AssertionError("nothing is decoded or encoded where the features are there")

    monkeypatch.setattr(sources, "open_clips", forbidden)
    code, text, error = train(again, *more)
    assert code == 0, error
    assert "features: 20 clips and 10 captions" in text
    assert read_losses(again) == read_losses(cached)
    # the autoencoder comes along, for sampling
    assert (again / "checkpoints" / "step-00000008" / FITTED).is_file()
    assert STDiT2.from_pretrained(again / "checkpoints" / "step-00000008" / "ema").config.caption_channels == 32


def test_resume_from_features_is_exact(train, tmp_path):
    more = [f"features={tmp_path / 'features'}"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(whole, "--steps", 8, *more)[0] == 0
    for steps in (3, 6, 8):
        assert train(out, "--steps", steps, "--resume", "auto", *more)[0] == 0
    assert read_losses(out) == read_losses(whole)
    a, b = (load_file(run / "checkpoints/step-00000008/ema/model.safetensors") for run in (out, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)
    code, _, error = train(out, "--steps", 9, "--resume", "auto")
    assert code == 1 and "was written with features, not clips" in error


def test_another_seed_draws_the_same_clips_and_says_so(train, tmp_path):
    """Several trainings may differ by their seed and share what was encoded once."""
    first, out, whole = tmp_path / "first", tmp_path / "run", tmp_path / "whole"
    more = [f"features={tmp_path / 'features'}"]
    assert train(first, "--steps", 4, *more)[0] == 0
    code, text, error = train(whole, "--steps", 4, *more, "seed=7")
    assert code == 0, error
    assert "were made with seed=42, which decides which clips come when; seed=7 decides the rest" in " ".join(
        text.split()
    )
    pairs = list(zip(read_losses(whole), read_losses(first), strict=True))
    assert all(one[5:] == other[5:] and one[1] != other[1] for one, other in pairs)
    for steps in (2, 4):
        code, _, error = train(out, "--steps", steps, "--resume", "auto", *more, "seed=7")
        assert code == 0, error
    assert read_losses(out) == read_losses(whole)


def test_features_in_the_folder_of_the_run_leave_it_held(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    lock = f"import fcntl; fcntl.lockf(open({str(out / '.lock')!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    refused = []

    def run(trainer, steps_left):
        other = subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True)
        refused.append("BlockingIOError" in other.stderr)

    monkeypatch.setattr(Trainer, "run", run)
    code, _, error = train(out, "--steps", 1, f"features={out}")
    assert code == 0 and refused == [True], error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["text_encoder.depth=1"], "were made with"),
        (["dataset.frame_interval=2", "bucket_config.144p={1: (1.0, 2)}"], "other buckets|frame_interval=1, not 2"),
        (["feature_draws=2"], "were made with draws=1, not 2"),
        (["bucket_config.144p.4=(0.5, 1)"], "belong to other buckets"),
    ],
)
def test_features_of_something_else_are_refused(train, tmp_path, more, message):
    import re

    folder = tmp_path / "features"
    assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 0
    index = folder / "index.json"
    for _ in ("complete", "not complete"):
        for dry in (["--dry-run"], []):
            code, _, error = train(tmp_path / "second", "--steps", 1, f"features={folder}", *more, *dry)
            assert code == 1 and re.search(message, error) and str(folder) in error, error
        index.write_text(index.read_text().replace('"complete": true', '"complete": false'))


def test_features_that_are_not_complete_go_on_with_their_seed_only(train, tmp_path):
    folder = tmp_path / "features"
    assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 0
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"complete": true', '"complete": false'))
    for dry in (["--dry-run"], []):
        code, _, error = train(tmp_path / "second", "--steps", 1, f"features={folder}", "seed=7", *dry)
        assert code == 1 and f"features={folder} are not complete, and were begun with seed=42: go on with" in error


def test_dry_run_shows_what_the_features_of_a_run_give(train, tmp_path):
    folder = tmp_path / "features"
    code, text, error = train(tmp_path / "run", "--steps", 1, f"features={folder}", "--dry-run")
    assert code == 0, error
    assert f"features: not all are in {folder} yet; the run would make them first" in text and not folder.exists()
    assert train(tmp_path / "run", "--steps", 1, f"features={folder}")[0] == 0
    more = ["--resume", "auto", f"features={folder}", "--dry-run"]
    code, text, error = train(tmp_path / "run", "--steps", 1, *more)
    assert code == 0, error
    assert "6 steps of 1 micro-batch" in text and "not all" not in text
    code, _, error = train(tmp_path / "run", "--steps", 1, *more, "drop_last=False")
    assert code == 1 and "was written with another table of clips" in error
    (tmp_path / "file").touch()
    for dry in (["--dry-run"], []):
        code, _, error = train(tmp_path / "other", "--steps", 1, f"features={tmp_path / 'file'}", *dry)
        assert code == 1 and f"features={tmp_path / 'file'} is a file; name the folder" in error


def test_features_of_another_autoencoder_are_refused(train, tmp_path):
    """A run that starts from another one has its autoencoder."""
    folder, other = tmp_path / "features", tmp_path / "other"
    assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 0
    assert train(other, "--steps", 0, "bucket_config={'144p': {1: (1.0, 2)}}")[0] == 0
    assert (other / FITTED).read_bytes() != (folder / FITTED).read_bytes()
    arguments = ["--steps", 1, "--init-from", other]
    code, _, error = train(tmp_path / "second", *arguments, f"features={folder}")
    assert code == 1 and f"features={folder} were made with another linear autoencoder than this run has" in error
    new = tmp_path / "new"
    code, _, error = train(tmp_path / "third", *arguments, f"features={new}")
    assert code == 0, error
    assert (new / FITTED).read_bytes() == (other / FITTED).read_bytes()


@pytest.fixture
def autoencoders(train, tmp_path):
    """Folders of two linear autoencoders."""
    folders = []
    for name, buckets in (("one", []), ("two", ["bucket_config={'144p': {1: (1.0, 2)}}"])):
        assert train(tmp_path / name, "--steps", 0, *buckets)[0] == 0
        folders.append((tmp_path / name / FITTED).parent)
    return folders


def test_features_are_refused_where_other_weights_lie_in_the_folder_of_an_encoder(train, tmp_path, autoencoders):
    vae, other = autoencoders
    more = [f"features={tmp_path / 'features'}", f"vae.from_pretrained={vae}"]
    assert train(tmp_path / "first", "--steps", 2, *more)[0] == 0
    shutil.copytree(vae, tmp_path / "kept")
    shutil.copytree(other, vae, dirs_exist_ok=True)
    code, _, error = train(tmp_path / "second", "--steps", 2, *more)
    assert code == 1 and "were made with other encoders (vae.weights: '" in error and "or another folder" in error
    (tmp_path / "features" / "index.json").write_text(
        (tmp_path / "features" / "index.json").read_text().replace('"complete": true', '"complete": false')
    )
    code, _, error = train(tmp_path / "second", "--steps", 2, *more)
    assert code == 1 and "were made with other encoders (vae.weights: '" in error
    shutil.copytree(tmp_path / "kept", vae, dirs_exist_ok=True)
    code, _, error = train(tmp_path / "third", "--steps", 2, *more)
    assert code == 0, error
    assert read_losses(tmp_path / "third") == read_losses(tmp_path / "first")


@pytest.mark.parametrize("missing", ["there", "here"])
def test_where_weights_cannot_be_compared_features_are_used_and_a_note_says_so(train, tmp_path, autoencoders, missing):
    """They are not on this machine, or the features come from a version that did not write down what is in them."""
    vae, _ = autoencoders
    folder = tmp_path / "features"
    more = [f"features={folder}", f"vae.from_pretrained={vae}"]
    assert train(tmp_path / "first", "--steps", 2, *more)[0] == 0
    if missing == "here":
        shutil.rmtree(vae)
    else:
        index = json.loads((folder / "index.json").read_text())
        del index["settings"]["encoders"]["vae"]["weights"]
        (folder / "index.json").write_text(json.dumps(index))
    code, text, error = train(tmp_path / "second", "--steps", 2, *more)
    assert code == 0, error
    reason = {"here": "those are not on this machine", "there": "a version that did not write down what was in those"}
    assert f"cannot be compared with the weights of vae in {vae}: " in text and reason[missing] in text
    assert read_losses(tmp_path / "second") == read_losses(tmp_path / "first")
    if missing == "there":  # a shard of such features can be made anew, too
        next(folder.glob("latents-*")).unlink()
        code, _, error = train(tmp_path / "again", "--steps", 2, *more)
        assert code == 0, error
        assert read_losses(tmp_path / "again") == read_losses(tmp_path / "first")
    code, _, error = train(tmp_path / "third", "--steps", 2, *more, "vae.from_pretrained=elsewhere")
    assert code == 1 and f"vae.from_pretrained: '{vae}' there, 'elsewhere' here" in error


def test_features_without_their_autoencoder_are_refused(train, tmp_path):
    features = tmp_path / "features"
    assert train(tmp_path / "run", "--steps", 1, f"features={features}")[0] == 0
    shutil.rmtree(features / "encoders")
    code, _, error = train(tmp_path / "other", "--steps", 1, f"features={features}")
    assert code == 1 and f"features={features} lack {features / 'encoders/vae'}" in error
    # A run that has it goes on.
    assert train(tmp_path / "run", "--steps", 2, "--resume", "auto", f"features={features}")[0] == 0


def test_features_that_do_not_say_what_made_them_are_refused(train, tmp_path):
    """As `write_features` may be called by a program."""
    folder = tmp_path / "features"
    assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 0
    index = json.loads((folder / "index.json").read_text())
    index["settings"]["encoders"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    code, _, error = train(tmp_path / "second", "--steps", 0, f"features={folder}")
    assert code == 1 and "made with other encoders (dtype: None there, 'fp32' here; " in error


def test_features_that_are_not_complete_go_on_with_their_autoencoder(train, tmp_path, monkeypatch):
    folder = tmp_path / "features"

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "write_features", stop)
        assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 130
    fitted = (folder / FITTED).read_bytes()

    def forbidden(*arguments):
        raise AssertionError("fitted again")

    monkeypatch.setattr(encoders, "fit_linear_autoencoder", forbidden)
    code, _, error = train(tmp_path / "second", "--steps", 0, f"features={folder}")
    assert code == 0, error
    assert (tmp_path / "second" / FITTED).read_bytes() == (folder / FITTED).read_bytes() == fitted


def test_features_go_on_where_a_process_was_killed_before_it_listed_the_first(train, tmp_path, monkeypatch):
    folder, killed = tmp_path / "features", tmp_path / "killed"
    real = FeatureWriter._write_shard

    def write_shard(self, *arguments):
        real(self, *arguments)
        if not killed.exists():
            shutil.copytree(self.folder, killed)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "_write_shard", write_shard)
        assert train(tmp_path / "first", "--steps", 0, f"features={folder}")[0] == 0
    assert [path.name for path in killed.glob("*.safetensors")] == ["latents-00000.safetensors"]
    code, _, error = train(tmp_path / "second", "--steps", 0, f"features={killed}")
    assert code == 0, error
    for name in ("latents-00000.safetensors", "text-00000.safetensors", "index.json"):
        assert (killed / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_no_part_of_an_autoencoder_is_left_where_it_cannot_be_written(train, tmp_path, monkeypatch, error):
    real = Path.write_text

    def fill_disk(path, *arguments, **options):
        if path.parent.name == ".unfinished-vae":
            raise error
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fill_disk)
    code, _, told = train(tmp_path / "run", "--steps", 0)
    assert code == 1 and f"the autoencoder {tmp_path / 'run' / 'encoders' / 'vae'} could not be written: " in told
    assert "No space left on device" in told and "unexpected" not in told
    assert list((tmp_path / "run" / "encoders").iterdir()) == []


def test_damaged_features_are_named_and_made_anew_where_they_are_deleted(train, tmp_path):
    folder = tmp_path / "features"
    assert train(tmp_path / "first", "--steps", 6, f"features={folder}")[0] == 0
    for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-5])
        out = tmp_path / f"run-{number}"
        code, _, error = train(out, "--steps", 6, f"features={folder}")
        assert (
            code == 1 and f"{shard} cannot be used" in error and "Delete it and" in error and "Traceback" not in error
        )
        shard.unlink()
        code, _, error = train(out, "--steps", 6, f"features={folder}")
        assert code == 0, error
        assert shard.read_bytes() == whole
        assert read_losses(out) == read_losses(tmp_path / "first")
    shutil.rmtree(folder)
