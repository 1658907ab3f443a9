"""A small part of the thousand damaged clips, through both decoders and through the loader."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from coded_clips import write_clip

from opensora_fast.data import fuzz_clips
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.decoding.clips import BadClip
from opensora_fast.data.decoding.dali_decoder import is_dali_installed
from opensora_fast.data.decoding.decoders import build_decoder
from opensora_fast.data.fuzz_clips import DALI_SOURCES, HOPELESS, KINDS, count_decodable_frames, damage, fuzz, main
from opensora_fast.data.loader import ClipLoader
from opensora_fast.data.manifest import Manifest

COUNT = 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return fuzz_clips.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("name", ["pyav", "dali"])
def test_damaged_clips(tmp_path, sources, name):
    if name == "dali":
        if not is_dali_installed():
            pytest.skip("DALI is not installed")
        sources = [path for path in sources if path.suffix in DALI_SOURCES]
    decoder = build_decoder(name, time_limit=20, report=str)
    report = fuzz(decoder, sources, COUNT, tmp_path, seed=1)
    decoder.close()
    assert not report.missed
    assert sum(report.outcomes.values()) == COUNT
    for kind in HOPELESS:
        assert report.outcomes[kind, "decoded"] == 0 and report.outcomes[kind, "listed"] == COUNT // len(KINDS)
    assert report.outcomes["truncated", "listed"] > 0
    listed = [json.loads(line) for line in (tmp_path / "bad_clips.jsonl").read_text().splitlines()]
    assert len(listed) == sum(number for (_, what), number in report.outcomes.items() if what == "listed")
    assert all(entry["reason"] for entry in listed)
    assert len({entry["row"] for entry in listed}) == len(listed)


def test_missed_clips_are_noticed(tmp_path, sources):
    """A decoder that gives out anything must be found out."""

    class Careless:
        def decode(self, requests):
            return [torch.zeros(3, len(request.frames), *request.size) for request in requests]

    report = fuzz(Careless(), sources, 24, tmp_path)
    assert len(report.missed) >= 24 // len(KINDS) * len(HOPELESS)
    assert "24 clips" in str(report) and f"{len(report.missed)} missed" in str(report)


def test_undamaged_clips_are_decoded(sources):
    decoder = build_decoder("pyav", report=str)
    rng = np.random.default_rng(0)
    requests = [fuzz_clips._make_request(row, path, path, rng) for row, path in enumerate(sources)]
    assert not [result for result in decoder.decode(requests) if isinstance(result, BadClip)]
    assert [count_decodable_frames(str(path)) for path in sources] == list(fuzz_clips.SOURCE_FRAMES.values())
    decoder.close()


def test_training_goes_on_with_a_third_of_the_clips_damaged(tmp_path, sources):
    """Through the loader: every batch is whole, and the list names damaged files only."""
    rng = np.random.default_rng(2)
    rows, damaged = [], set()
    for number in range(36):
        path = tmp_path / f"{number}.mp4"
        if number % 3 == 0:
            kind = KINDS[number // 3 % len(KINDS)]
            path.write_bytes(damage(kind, sources[0], rng)[0])
            damaged.add(number)
        else:
            path.write_bytes(sources[number % 2].read_bytes())
        rows.append({"path": path.name, "text": "", "num_frames": 48, "height": 144, "width": 256, "fps": 25.0})
    manifest = Manifest(pd.DataFrame(rows), folder=tmp_path)
    bucket = Bucket({"144p": {8: (1.0, 4)}})
    sampler = BucketSampler(manifest, bucket, frame_interval=2, seed=0)
    decoder = build_decoder("auto", report=str)
    loader = ClipLoader(manifest, sampler, decoder, seed=0, bad_clips_path=tmp_path / "bad.jsonl", report=str)
    batches = list(loader.load(sampler.iterate(0, 0)))
    loader.close()
    assert [batch.video.shape for batch in batches] == [(4, 3, 8, 144, 256)] * 9
    listed = {json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()}
    assert listed <= damaged and len(listed) >= 8
    assert not listed & {row for batch in batches for row in batch.rows}


def test_command_line(tmp_path, capsys):
    assert main(["--count", "12", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "12 clips" in text and "0 missed" in text and "lost to crashes or hangs: 0" in text


def test_unknown_kind(tmp_path):
    path = write_clip(tmp_path, "vp9 webm", 2)
    with pytest.raises(ValueError, match="kind must be one of truncated"):
        damage("burnt", path, np.random.default_rng(0))
