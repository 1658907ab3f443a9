"""Cached features: the same clips as training from videos, complete after a stop, and damage is named."""

import json
import os
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from fake_clips import FakeDecoder, make_manifest, take_epoch

from opensora_fast.data import feature_store
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.feature_store import FeatureError, FeatureIndex, FeatureReader, FeatureWriter
from opensora_fast.data.features import FeatureLoader, FeatureSampler, write_features
from opensora_fast.data.loader import ClipLoader
from opensora_fast.data.manifest import Manifest

# Some of the videos would be long enough for 8 frames if all of theirs were taken.
INTERVAL, SEED = 3, 3
CONFIG = {"144p": {1: (0.6, 2), 4: (0.7, 3), 8: (0.5, 2)}}
BUCKETS = Bucket(CONFIG)


class Encoder:
    """Latents: the mean of 8 x 8 blocks in four channels, plus noise where there is a generator."""

    out_channels, patch_size = 4, (1, 8, 8)

    def __init__(self, noise=0.0, stop_after=None):
        self.noise = noise
        self.left = stop_after
        self.seeds = []

    def encode(self, video, generator=None):
        assert generator is None or not torch.is_grad_enabled()
        self.seeds.append(generator and generator.initial_seed())
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        means = video[..., : video.shape[-2] // 8 * 8, : video.shape[-1] // 8 * 8]
        means = means.unfold(-2, 8, 8).unfold(-2, 8, 8).mean((-1, -2))[:, :1].expand(-1, 4, -1, -1, -1)
        return means + self.noise * torch.randn(means.shape, generator=generator)


class Text:
    """One token for each letter, its code in 6 channels."""

    output_dim, model_max_length = 6, 12

    def __init__(self):
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        embeddings, mask = torch.zeros(len(texts), 1, 12, 6), torch.zeros(len(texts), 12, dtype=torch.int64)
        for place, text in enumerate(texts):
            codes = torch.tensor([ord(letter) for letter in text[:12]], dtype=torch.float32)
            embeddings[place, 0, : len(codes)] = codes[:, None]
            embeddings[place, 0, len(codes) :] = 99.0  # what an encoder gives for padding
            mask[place, : len(codes)] = 1
        return {"y": embeddings, "mask": mask}


def make_loader(decoder=None, manifest=None, bucket=BUCKETS, **options):
    manifest = manifest or make_manifest()
    sampler = BucketSampler(manifest, bucket, frame_interval=INTERVAL, seed=SEED)
    decoder = decoder or FakeDecoder()
    options = {"seed": SEED, "report": lambda text: None, **options}
    return ClipLoader(manifest, sampler, decoder, **options)


def write(folder, encoder=None, text=None, loader=None, **options):
    loader = loader or make_loader()
    try:
        return write_features(loader, encoder or Encoder(), text or Text(), folder, **options)
    finally:
        loader.close()


def open_loader(folder, manifest=None, bucket=BUCKETS, **options):
    manifest = manifest or make_manifest()
    reader = FeatureReader(FeatureIndex.read(folder))
    return FeatureLoader(manifest, FeatureSampler(manifest, bucket, reader, **options))


def contents(folder):
    reader = FeatureReader(FeatureIndex.read(folder))
    return (
        {place: reader.get_latents(*place) for place in reader.latent_places},
        {row: reader.get_text(row) for row in reader.text_places},
    )


def assert_same_contents(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for place, tensor in one.items():
            assert torch.equal(tensor, other[place]), place


def test_first_epochs_are_those_of_training_from_clips(tmp_path):
    write(tmp_path, draws=2)
    features, clips = open_loader(tmp_path), make_loader()
    encoder, text_encoder = Encoder(), Text()
    for epoch in range(2):
        expected = take_epoch(clips, epoch)
        found = take_epoch(features, epoch)
        assert len(found) == len(expected) > 3
        for batch, clip_batch in zip(found, expected, strict=True):
            names = ("text", "bucket", "rows", "index", "epoch")
            assert [getattr(batch, name) for name in names] == [getattr(clip_batch, name) for name in names]
            for name in ("num_frames", "height", "width", "ar", "fps"):
                assert torch.equal(getattr(batch, name), getattr(clip_batch, name)), name
            assert batch.video is None
            assert torch.equal(batch.latents, encoder.encode(clip_batch.video))
            encoding = text_encoder.encode(clip_batch.text)
            assert torch.equal(batch.text_mask, encoding["mask"]) and batch.text_mask.dtype == torch.int64
            real = encoding["mask"].bool()
            assert batch.text_embeddings.shape == encoding["y"].shape
            assert torch.equal(batch.text_embeddings[:, 0][real], encoding["y"][:, 0][real])
            assert not batch.text_embeddings[:, 0][~real].any()
    features.close()
    clips.close()


def test_a_balanced_order_is_that_of_training_from_clips_too(tmp_path):
    write(tmp_path, draws=2)
    costs = np.linspace(1, 5, len(BUCKETS))[::-1]
    features = open_loader(tmp_path, costs=costs)
    clips = BucketSampler(make_manifest(), BUCKETS, frame_interval=INTERVAL, seed=SEED, costs=costs)
    for epoch in range(2):
        found = take_epoch(features, epoch)
        expected = list(clips.iterate(epoch, 0))
        assert [(batch.bucket, batch.rows) for batch in found] == [(batch.bucket, batch.rows) for batch in expected]
    plan = features.sampler.get_plan(2)
    small = [costs[plan.bucket_of[first : first + 8]].tolist() for first in range(0, len(plan), 8)]
    assert all(group == sorted(group) for group in small) and plan.epoch == 2
    features.close()


def test_later_epochs_use_the_draws_again_in_another_order(tmp_path):
    write(tmp_path, draws=2)
    loader = open_loader(tmp_path)
    epochs = [take_epoch(loader, epoch) for epoch in range(6)]

    def count_uses(batches):
        return Counter((batch.bucket, row) for batch in batches for row in batch.rows)

    for epoch in range(2, 6):
        uses, first_uses = count_uses(epochs[epoch]), count_uses(epochs[epoch % 2])
        assert uses.keys() == first_uses.keys(), "the same clips in the same buckets"
        # As often, but others of a bucket fill up its last micro-batch.
        of_buckets, first_of_buckets = ([(key[0], n) for key, n in used.items()] for used in (uses, first_uses))
        assert sorted(of_buckets) == sorted(first_of_buckets)
        assert [batch.epoch for batch in epochs[epoch]] == [epoch] * len(epochs[epoch])
    orders = {tuple(batch.rows for batch in batches) for batches in epochs}
    assert len(orders) == 6
    # For all time: a stored position must mean the same clips in every later version, of NumPy too.
    assert [batch.rows for batch in epochs[2]] == [(10, 8), (5, 6), (3, 3, 3), (12, 13)]
    again = open_loader(tmp_path)
    assert [batch.rows for batch in take_epoch(again, 5)] == [batch.rows for batch in epochs[5]]


@pytest.mark.parametrize("draws", [1, 2])
def test_only_epochs_of_one_draw_are_known_to_have_as_many_steps(tmp_path, draws):
    write(tmp_path, draws=draws)
    loader = open_loader(tmp_path)
    steps = sum(len(list(loader.sampler.iterate(epoch, 0))) for epoch in range(3))
    assert loader.sampler.count_steps_left(3, 0, 0) == (steps if draws == 1 else None)
    loader.close()


def test_captions_are_encoded_once_and_clips_once_in_a_draw(tmp_path):
    text = Text()
    index = write(tmp_path, text=text, draws=3)
    assert sorted(text.texts) == sorted(set(text.texts))
    latents, texts = contents(tmp_path)
    for draw in range(3):
        sampler = BucketSampler(make_manifest(), BUCKETS, frame_interval=INTERVAL, seed=SEED)
        expected = {row for micro_batch in sampler.iterate(draw, 0) for row in micro_batch.rows}
        assert {row for written, row in latents if written == draw} == expected
    assert set(texts) == {row for _, row in latents} and len(texts) == len(text.texts)
    assert index.complete and sum(shard.count for shard in index.shards) == len(latents) + len(texts)


def test_other_batch_sizes(tmp_path):
    write(tmp_path)
    larger = Bucket({"144p": {frames: (keep, 5) for frames, (keep, _) in CONFIG["144p"].items()}})
    loader = open_loader(tmp_path, bucket=larger)
    assert {len(batch) for batch in take_epoch(loader)} == {5}


def test_processes_share_the_batches(tmp_path):
    write(tmp_path)
    whole = [batch.rows for batch in take_epoch(open_loader(tmp_path))]
    parts = [[batch.rows for batch in take_epoch(open_loader(tmp_path, rank=rank, world_size=2))] for rank in range(2)]
    merged = [rows for pair in zip(*parts, strict=True) for rows in pair]
    assert merged[: len(whole)] == whole


def test_resume_of_a_run(tmp_path):
    write(tmp_path)
    loader = open_loader(tmp_path)
    rows = [batch.rows for batch in take_epoch(loader, 1)]
    assert [batch.rows for batch in loader.iterate(1, 2)] == rows[2:]
    loader.close()


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7])
def test_stopped_and_started_again(tmp_path, stop_after):
    """What was written stays, the rest is made, and the noise of the encoder is that of a run without a stop."""
    write(tmp_path / "whole", Encoder(noise=1.0), draws=2, shard_bytes=200_000)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", Encoder(noise=1.0, stop_after=stop_after), draws=2, shard_bytes=200_000)
    assert not FeatureIndex.read(tmp_path / "parts").complete
    with pytest.raises(FeatureError, match="not complete"):
        open_loader(tmp_path / "parts")
    text = Text()
    index = write(tmp_path / "parts", Encoder(noise=1.0), text, draws=2, shard_bytes=200_000)
    assert index.complete and len(index.shards) > 2
    assert_same_contents(contents(tmp_path / "parts"), contents(tmp_path / "whole"))
    nothing = Encoder(stop_after=0)
    write(tmp_path / "parts", nothing, draws=2, shard_bytes=200_000)  # encodes nothing, or it would stop


def test_a_lost_or_damaged_shard_is_made_anew(tmp_path):
    write(tmp_path, Encoder(noise=1.0), draws=2, shard_bytes=200_000)
    before = contents(tmp_path)
    shards = FeatureIndex.read(tmp_path).shards
    first, *others = [shard for shard in shards if shard.kind == "latents"]
    text = next(shard for shard in shards if shard.kind == "text")
    (tmp_path / first.file).unlink()
    flip_byte(tmp_path / others[-1].file, -9)
    (tmp_path / text.file).write_bytes(b"")
    write(tmp_path, Encoder(noise=1.0), draws=2, shard_bytes=200_000)
    assert_same_contents(contents(tmp_path), before)


def test_lost_captions_are_encoded_anew_beside_latents_that_are_there(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    for shard in tmp_path.glob("text-*.safetensors"):
        shard.unlink()
    write(tmp_path)
    assert_same_contents(contents(tmp_path), before)


def test_what_was_encoded_before_a_stop_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Encoder(stop_after=2))
    assert {shard.kind for shard in FeatureIndex.read(tmp_path).shards} == {"latents", "text"}


def test_every_micro_batch_of_every_draw_has_noise_of_its_own(tmp_path):
    encoder = Encoder(noise=1.0)
    write(tmp_path, encoder, draws=2)
    assert len(encoder.seeds) == len(set(encoder.seeds)) > 4


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_shards_are_named(tmp_path, damage):
    write(tmp_path)
    shard = tmp_path / next(shard.file for shard in FeatureIndex.read(tmp_path).shards if shard.kind == "latents")
    if damage == "flip":
        flip_byte(shard, -9)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        shard.unlink()
    with pytest.raises(FeatureError, match=f"{shard.name} cannot be used.*Delete it and write the features again"):
        take_epoch(open_loader(tmp_path))


def test_any_bit_that_flips_in_a_shard_is_told_before_its_features_are_used(tmp_path):
    write(tmp_path)
    shard = tmp_path / next(shard.file for shard in FeatureIndex.read(tmp_path).shards if shard.kind == "latents")
    whole = shard.read_bytes()
    rows_begin = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, rows_begin, 40), *range(rows_begin, rows_begin + 600, 7), len(whole) // 2]:
        flip_byte(shard, place)
        with pytest.raises(FeatureError, match=f"{shard.name} cannot be used"):
            take_epoch(open_loader(tmp_path))
        shard.write_bytes(whole)


def test_shards_are_not_read_before_their_features_are(tmp_path, monkeypatch):
    """To read a terabyte takes minutes, in every process."""
    write(tmp_path, shard_bytes=20_000)
    read = []
    hash_file = feature_store.hash_file
    monkeypatch.setattr(feature_store, "hash_file", lambda path: (read.append(path.name), hash_file(path))[1])
    loader = open_loader(tmp_path)
    assert read == []
    batches = take_epoch(loader)
    shards = {shard.file for shard in FeatureIndex.read(tmp_path).shards}
    assert len(batches) > 3 and len(shards) > 4 and sorted(read) == sorted(shards)


def flip_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)


def test_features_are_those_that_were_given_in_shards_of_the_size_asked_for(tmp_path):
    writer = FeatureWriter(tmp_path, {}, shard_bytes=32)
    buffer = torch.empty(4)  # which an encoder may use again
    for row in range(4):
        writer.add_latents(0, row, buffer.fill_(row))
    writer.add_text(7, buffer.fill_(7))
    buffer.zero_()
    writer.flush()
    reader = FeatureReader(FeatureIndex.read(tmp_path))
    assert [reader.get_latents(0, row)[0].item() for row in range(4)] == [0, 1, 2, 3]
    assert reader.get_text(7)[0].item() == 7
    assert [(shard.kind, shard.count) for shard in reader.index.shards] == [("latents", 2), ("latents", 2), ("text", 1)]


def test_the_shards_that_were_read_last_stay_open_and_no_others(tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path, {}, shard_bytes=1)
    for row in range(4):
        writer.add_latents(0, row, torch.zeros(4))
    monkeypatch.setattr(feature_store, "OPEN_SHARDS", 2)
    reader = FeatureReader(FeatureIndex.read(tmp_path))
    opened, real = [], safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **how: opened.append(path.name) or real(path, **how))
    for row in (0, 1, 0, 2, 0, 1):
        reader.get_latents(0, row)
    assert opened == [f"latents-0000{row}.safetensors" for row in (0, 1, 2, 1)]


def test_bad_clips_are_left_out(tmp_path):
    sampler = BucketSampler(make_manifest(), BUCKETS, frame_interval=INTERVAL, seed=SEED)
    bad = {row for row in next(sampler.iterate(0, 0)).rows}
    loader = make_loader(FakeDecoder(bad), bad_clips_path=tmp_path / "bad.jsonl")
    write(tmp_path / "features", loader=loader, draws=2)
    assert {json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()} == bad
    features = open_loader(tmp_path / "features")
    rows = {row for epoch in range(4) for batch in take_epoch(features, epoch) for row in batch.rows}
    assert rows and not rows & bad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 2}, "draws: 1 there, 2 here"),
        ({"encoders": {"vae": {"type": "other"}}}, "encoders.vae.type: None there, 'other' here"),
        ({"loader": lambda: make_loader(bucket=Bucket({"144p": {1: (1.0, 2)}}))}, "buckets: "),
        ({"loader": lambda: make_loader(manifest=make_manifest(videos=11))}, "manifest: "),
    ],
)
def test_folder_of_other_features(tmp_path, change, message):
    write(tmp_path)
    if "loader" in change:
        change = {"loader": change["loader"]()}
    with pytest.raises(FeatureError, match=f"made in another way.*{message}.*use another folder"):
        write(tmp_path, **change)


def test_other_table_or_buckets(tmp_path):
    write(tmp_path)
    renamed = make_manifest().table.assign(text="other")
    with pytest.raises(FeatureError, match="belong to another table"):
        open_loader(tmp_path, manifest=Manifest(pd.DataFrame(renamed)))
    texts = list(make_manifest().table["text"])
    moved = make_manifest().table.assign(text=[texts[0][:-1], texts[0][-1] + texts[1], *texts[2:]])
    with pytest.raises(FeatureError, match="belong to another table"):
        open_loader(tmp_path, manifest=Manifest(pd.DataFrame(moved)))
    with pytest.raises(FeatureError, match="belong to other buckets"):
        open_loader(tmp_path, bucket=Bucket({"144p": {1: (1.0, 2), 4: (0.7, 3), 8: (0.5, 2)}}))


def test_no_or_broken_index(tmp_path):
    with pytest.raises(FeatureError, match="does not exist"):
        FeatureIndex.read(tmp_path)
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "index.json").write_bytes(content)
        with pytest.raises(FeatureError, match="index.json is damaged.*delete the folder"):
            FeatureIndex.read(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 99}')
    with pytest.raises(FeatureError, match="has version 99"):
        FeatureIndex.read(tmp_path)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="draws must be 1"):
        write(tmp_path, draws=0)
    manifest = make_manifest()
    sampler = BucketSampler(manifest, BUCKETS, frame_interval=INTERVAL, seed=SEED, world_size=2)
    loader = ClipLoader(manifest, sampler, FakeDecoder(), seed=SEED)
    with pytest.raises(ValueError, match="by one process"):
        write_features(loader, Encoder(), Text(), tmp_path)
    sampler = BucketSampler(manifest, BUCKETS, frame_interval=INTERVAL, seed=SEED, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=False, or clips would be missing"):
        write_features(ClipLoader(manifest, sampler, FakeDecoder(), seed=SEED), Encoder(), Text(), tmp_path)

    class PaddedInFront(Text):
        def encode(self, texts):
            return {name: value.flip(-1) for name, value in super().encode(texts).items()}

    with pytest.raises(ValueError, match="must put the real tokens first"):
        write(tmp_path, text=PaddedInFront())


def test_half_precision_and_no_padding_on_disk(tmp_path):
    writer = FeatureWriter(tmp_path, {"a": 1})
    latents, text = torch.randn(4, 2, 3, 5).bfloat16(), torch.randn(7, 6).bfloat16()
    writer.add_latents(0, 5, latents)
    writer.add_text(5, text)
    writer.add_text(5, torch.zeros(1, 6))  # there already
    writer.flush(complete=True)
    reader = FeatureReader(FeatureIndex.read(tmp_path))
    assert torch.equal(reader.get_latents(0, 5), latents) and torch.equal(reader.get_text(5), text)
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(KeyError):
        reader.get_latents(1, 5)


def test_a_full_disk_is_told_and_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def fill_disk(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_disk)
        with pytest.raises(FeatureError, match=f"the features {tmp_path}/.* could not be written: .*No space left"):
            write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)  # the same again goes on


def test_a_shard_is_on_the_disk_under_its_name_before_it_is_listed(tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path, {})
    writer.add_latents(0, 0, torch.zeros(4))
    flushed = []
    monkeypatch.setattr(feature_store, "flush", lambda path: flushed.append(path.name))
    writer.flush()
    assert flushed == [".latents-00000.safetensors.part", tmp_path.name, ".index.json.part", tmp_path.name]


def test_no_thread_is_left(tmp_path, count_begun_threads):
    write(tmp_path)
    loader = open_loader(tmp_path)
    for _ in loader.iterate(0, 0):
        break
    loader.close()
    assert count_begun_threads() == 0
