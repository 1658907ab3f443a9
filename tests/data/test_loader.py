"""The clip loader: what is in a batch, bad clips, determinism, running ahead, and an end without leftovers."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from coded_clips import draw_frames, read_all, write_clip
from fake_clips import BUCKETS, INTERVAL, FakeDecoder, GatedDecoder, make_loader, make_manifest, summarize, take_epoch
from PIL import Image

from opensora_fast.data.bad_clips import read_bad_clips
from opensora_fast.data.decoding.clips import choose_frames
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder
from opensora_fast.data.decoding.resize import resize_frame, resize_image
from opensora_fast.data.loader import REPLACEMENTS
from opensora_fast.data.manifest import Manifest


def test_batches_hold_what_the_model_is_told():
    decoder = FakeDecoder()
    loader = make_loader(decoder)
    batches = take_epoch(loader)
    assert len(batches) == 8 and [batch.index for batch in batches] == list(range(8))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(16))
    for batch in batches:
        frames, height, width = BUCKETS.get_thw(batch.bucket)
        assert batch.video.shape == (2, 3, frames, height, width) and batch.video.dtype == torch.float32
        for condition in (batch.num_frames, batch.height, batch.width, batch.ar, batch.fps):
            assert condition.shape == (2,) and condition.dtype == torch.float32 and condition.device.type == "cpu"
        assert batch.num_frames.tolist() == [frames] * 2
        assert (batch.height.tolist(), batch.width.tolist()) == ([height] * 2, [width] * 2)
        assert batch.ar.tolist() == pytest.approx([width / height] * 2)
        clips = [loader.manifest.clip(row) for row in batch.rows]
        assert batch.text == [clip.text for clip in clips]
        # The rate of the file for a video, as Open-Sora has it; 120 for an image whatever the table says.
        assert batch.fps.tolist() == [120.0 if clip.path.endswith("png") else clip.fps for clip in clips]
        assert batch.latents is None and len(batch) == 2
    loader.close()
    assert decoder.closed


def test_rate_after_the_interval_is_an_option():
    loader = make_loader(FakeDecoder(), fps_after_interval=True)
    for batch in take_epoch(loader):
        clips = [loader.manifest.clip(row) for row in batch.rows]
        assert batch.fps.tolist() == [120.0 if clip.path.endswith("png") else clip.fps / INTERVAL for clip in clips]
    loader.close()


def test_what_is_large_and_on_the_host_is_pinned_on_demand(monkeypatch):
    """A copy that is not pinned stands in for one that is, and the meta device for a GPU."""
    plain = take_epoch(make_loader(FakeDecoder()))[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = take_epoch(make_loader(FakeDecoder(), pin_memory=True))[0]
    assert torch.equal(pinned.video, plain.video + 1)
    assert pinned.rows == plain.rows and torch.equal(pinned.fps, plain.fps) and pinned.latents is None
    on_gpu, on_host = torch.zeros(2, device="meta"), torch.zeros(2)
    features = replace(plain, video=None, latents=on_gpu, text_embeddings=on_host).pin_memory()
    assert features.latents is on_gpu and torch.equal(features.text_embeddings, on_host + 1)


def test_frames_depend_on_seed_epoch_and_row_alone():
    decoder = FakeDecoder()
    loader = make_loader(decoder)
    take_epoch(loader, 5)
    for request in decoder.requests:
        clip = loader.manifest.clip(request.row)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 5, request.row))))
        assert request.frames == choose_frames(clip.num_frames, len(request.frames), INTERVAL, rng)
        assert request.is_image == request.path.endswith("png")
    loader.close()
    starts = {}
    for epoch in range(8):
        loader = make_loader(decoder := FakeDecoder())
        take_epoch(loader, epoch)
        for request in decoder.requests:
            starts.setdefault(request.row, set()).add(request.frames[0])
        loader.close()
    assert all(len(seen) > 1 for row, seen in starts.items() if row < 12), "another start in another epoch"


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_same_batches_whatever_runs_ahead_and_wherever_resumed(prefetch):
    reference = make_loader(FakeDecoder(bad=[4]))
    expected = [summarize(take_epoch(reference, epoch)) for epoch in range(2)]
    reference.close()
    loader = make_loader(FakeDecoder(bad=[4]), prefetch=prefetch)
    assert [summarize(take_epoch(loader, epoch)) for epoch in range(2)] == expected
    loader.close()
    for stop in (0, 3, 7):
        loader = make_loader(FakeDecoder(bad=[4]), prefetch=prefetch)
        for batch in loader.iterate(0, 0):
            if batch.index == stop:
                break
        loader.close()
        resumed = make_loader(FakeDecoder(bad=[4]), prefetch=prefetch)
        assert summarize(resumed.iterate(0, stop + 1)) == expected[0][stop + 1 :]
        assert summarize(take_epoch(resumed, 1)) == expected[1]
        resumed.close()


def test_bad_clips_are_replaced_counted_and_listed(tmp_path):
    bad = {1, 5, 13}
    said = []
    path = tmp_path / "new" / "bad_clips.jsonl"
    loader = make_loader(FakeDecoder(bad), bad_clips_path=path, report=said.append)
    batches = take_epoch(loader)
    first = read_bad_clips(path)
    assert {entry["row"] for entry in first} == bad and len(first) == len(said)
    good = make_loader(FakeDecoder())
    for batch, without in zip(batches, take_epoch(good), strict=True):
        assert batch.bucket == without.bucket and len(batch) == len(without)
        for row, original in zip(batch.rows, without.rows, strict=True):
            assert row not in bad and (row == original or original in bad)
            assert (loader.manifest.num_frames[row] == 1) == (batch.num_frames[0] == 1)
    for entry in first:
        assert set(entry) == {"row", "path", "reason", "epoch", "micro_batch"}
        batch = batches[entry["micro_batch"]]
        assert (entry["epoch"], entry["reason"]) == (0, "made bad")
        assert entry["path"].endswith(f"{entry['row'] % 12}.{'png' if entry['row'] > 11 else 'mp4'}")
        assert entry["row"] not in batch.rows
    loader.close()

    replay = make_loader(FakeDecoder(bad), bad_clips_path=path)
    assert summarize(take_epoch(replay)) == summarize(batches), "the same replacements on replay"
    assert read_bad_clips(path) == first + first, "appended"
    replay.close()
    good.close()


def test_another_bucket_stands_in_for_one_without_a_good_clip(tmp_path):
    said = []
    bad = range(12, 16)  # all images
    loader = make_loader(FakeDecoder(bad), bad_clips_path=tmp_path / "bad_clips.jsonl", report=said.append)
    batches, expected = take_epoch(loader), take_epoch(make_loader(FakeDecoder()))
    assert [batch.index for batch in batches] == [batch.index for batch in expected] == list(range(8))
    for batch, planned in zip(batches, expected, strict=True):
        if planned.bucket[1] != 1:
            assert (batch.bucket, batch.rows) == (planned.bucket, planned.rows)
        else:
            following = [other for other in expected[batch.index :] + expected if other.bucket[1] != 1]
            assert (batch.bucket, batch.rows) == (following[0].bucket, following[0].rows)
            assert batch.video.shape[2] == batch.num_frames[0] == batch.bucket[1]
            message = (
                rf"bucket 144p, 1, .* has no further clip .* micro-batch {batch.index} of epoch 0 is of bucket 144p, "
            )
            assert any(re.search(message, text) for text in said)
    assert {entry["row"] for entry in read_bad_clips(tmp_path / "bad_clips.jsonl")} == set(bad)
    assert summarize(loader.iterate(0, 3)) == summarize(batches[3:]), "the same on replay"
    loader.close()


def test_no_good_clip_in_any_bucket_stops_the_run():
    loader = make_loader(FakeDecoder(bad=range(16)))
    with pytest.raises(ValueError, match=r"made bad; and bucket 144p, .* no further clip.*nor could other buckets"):
        take_epoch(loader)
    loader.close()


def test_so_many_bad_clips_that_something_else_is_wrong():
    manifest = make_manifest(videos=60, images=0)
    loader = make_loader(FakeDecoder(bad=range(60)), manifest)
    with pytest.raises(ValueError, match="20 replacements of a clip could not be decoded either.*made bad"):
        take_epoch(loader)
    loader.close()


def test_a_clip_is_replaced_twenty_times_at_most():
    manifest = make_manifest(videos=60, images=0)
    sampler = make_loader(FakeDecoder(), manifest).sampler
    micro_batch = next(sampler.iterate(0, 0))
    row = micro_batch.rows[0]
    replacements = [sampler.replacement(micro_batch, row, attempt) for attempt in range(21)]
    loader = make_loader(FakeDecoder(bad={row, *replacements[:19]}), manifest)
    assert next(loader.iterate(0, 0)).rows == (replacements[19], *micro_batch.rows[1:])
    loader.close()
    loader = make_loader(FakeDecoder(bad={row, *replacements[:20]}), manifest)
    last = f"{replacements[19]}.mp4, because: made bad"
    with pytest.raises(
        ValueError, match=f"20 replacements of a clip could not be decoded either, the last one, ./{last}"
    ):
        next(loader.iterate(0, 0))
    loader.close()


def test_every_bad_clip_of_a_bucket_that_is_given_up_is_told():
    told = []
    loader = make_loader(FakeDecoder(bad=range(60)), make_manifest(videos=60, images=0), report=told.append)
    micro_batch = next(loader.sampler.iterate(0, 0))
    with pytest.raises(ValueError, match="could not be decoded"):
        next(loader.iterate(0, 0))
    loader.close()
    assert len(told) == (1 + REPLACEMENTS) * len(micro_batch.rows) > 1 + REPLACEMENTS


def test_runs_ahead_while_the_consumer_works():
    decoder = GatedDecoder()
    loader = make_loader(decoder, prefetch=2)
    batches = loader.iterate(0, 0)
    next(batches)
    deadline = time.monotonic() + 30
    while len(decoder.requests) < 2 * 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(decoder.requests) == 2 * 4, "two batches wait, the next one is made, and no further"
    decoder.gate.clear()
    assert [next(batches).index for _ in range(3)] == [1, 2, 3], "without any decoding"
    threading.Timer(0.3, decoder.gate.set).start()
    assert next(batches).index == 4
    assert decoder.gate.is_set(), "the next one was waited for"
    batches.close()
    loader.close()


def test_small_batches_are_decoded_together():
    alone, together = FakeDecoder(bad=[4, 13]), FakeDecoder(bad=[4, 13], threads=5)
    expected = summarize(take_epoch(make_loader(alone, prefetch=3)))
    assert set(alone.calls) <= {1, 2}
    assert summarize(take_epoch(make_loader(together, prefetch=3))) == expected
    calls = [count for count in together.calls if count > 1]  # calls for one clip are those of replacements
    assert calls == [2, 6, 6, 2], "the first batch alone, then three at a time for five threads"
    few = FakeDecoder(bad=[4, 13], threads=64)
    assert summarize(take_epoch(make_loader(few, prefetch=2))) == expected
    assert max(few.calls) == 4, "no more batches together than may be made ahead"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_travel_to_the_consumer_after_the_good_batches(prefetch, count_begun_threads):
    class Failing(FakeDecoder):
        def decode(self, requests):
            if len(self.requests) >= 4:
                raise ZeroDivisionError("in the decoder")
            return super().decode(requests)

    loader = make_loader(Failing(), prefetch=prefetch)
    seen = []
    with pytest.raises(ZeroDivisionError, match="in the decoder"):
        for batch in loader.iterate(0, 0):
            seen.append(batch.index)
    assert seen == [0, 1]
    assert count_begun_threads() == 0
    loader.close()


@pytest.mark.parametrize("how", ["break", "close", "epoch", "never started"])
def test_no_thread_is_left(how, count_begun_threads):
    loader = make_loader(FakeDecoder(), prefetch=1)
    if how == "break":
        for _ in loader.iterate(0, 0):
            break
    elif how == "close":
        batches = loader.iterate(0, 0)
        next(batches)
    elif how == "epoch":
        first = loader.iterate(0, 0)
        next(first)
        assert [batch.index for batch in take_epoch(loader)] == list(range(8)), "a new iteration starts anew"
        with pytest.raises(StopIteration):
            next(first)
    loader.close()
    assert count_begun_threads() == 0


def test_ctrl_c_in_the_wait_for_a_batch_ends_the_thread(count_begun_threads):
    decoder = GatedDecoder()
    loader = make_loader(decoder, prefetch=1)
    decoder.gate.clear()
    timers = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)), threading.Timer(0.6, decoder.gate.set)
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(loader.load(loader.sampler.iterate(0, 0)))
    for timer in timers:
        timer.join()
    assert count_begun_threads() == 0
    loader.close()


def test_arguments():
    for wrong in ({"prefetch": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="seed and prefetch must be 0 or more"):
            make_loader(FakeDecoder(), **wrong)


def test_real_files(tmp_path):
    """From coded files to batches: the pixels are those of a full decode, and damaged files are replaced."""
    sizes = [(144, 256), (160, 240)]
    paths = [write_clip(tmp_path, coding, 24, sizes[n % 2], f"{n}") for n, coding in enumerate(
        ["h264 b-frames", "vp9 webm", "mjpeg", "h264 mkv", "vp8", "h264 b-frames"]
    )]  # fmt: skip
    damaged = write_clip(tmp_path, "vp9 webm", 24, (144, 256), "damaged")
    damaged.write_bytes(damaged.read_bytes()[:500])
    paths.append(damaged)
    for number in range(2):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(draw_frames(1, (150, 250), number)[0]).save(paths[-1])
    rows = []
    for path in paths:
        image = path.suffix == ".png"
        height, width = (150, 250) if image else read_all(path).shape[1:3] if path != damaged else (144, 256)
        frames = 1 if image else 24
        rows.append(
            {"path": path.name, "text": "", "num_frames": frames, "height": height, "width": width, "fps": 25.0}
        )
    manifest = Manifest(pd.DataFrame(rows), folder=tmp_path)
    loader = make_loader(PyAVDecoder(threads=2), manifest, bad_clips_path=tmp_path / "bad.jsonl")
    batches = take_epoch(loader)
    assert {json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()} == {6}
    checked = 0
    for batch in batches:
        for row, video in zip(batch.rows, batch.video, strict=True):
            if paths[row].suffix == ".png":
                with Image.open(paths[row]) as image:
                    assert torch.equal(video, resize_image(image, tuple(video.shape[2:])))
                continue
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 0, row))))
            full = read_all(paths[row])
            for place, number in enumerate(choose_frames(24, video.shape[1], INTERVAL, rng)):
                expected = torch.empty(3, *video.shape[2:])
                resize_frame(full[number], expected)
                assert torch.equal(video[:, place], expected)
                checked += 1
    assert checked > 40
    loader.close()
