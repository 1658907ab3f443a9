"""Decoding speed of PyAV and DALI at three resolutions, and how busy the loader keeps the processors.

    pytest benchmarks/test_decode.py

A call decodes a micro-batch: CLIPS clips of FRAMES frames at interval INTERVAL, so three source frames are decoded for
each one that is kept. `extra_info` has the source frames decoded and the frames kept in a second, and the source frames
decoded in a second of processor time, which does not depend on what else the machine is doing.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
import torch

from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.decoding.clips import BadClip, ClipRequest
from opensora_fast.data.decoding.dali_decoder import CODECS, DaliDecoder, is_dali_installed
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder, count_processors
from opensora_fast.data.demo_clips import CARTOON, Cut, find_source_videos, transcode
from opensora_fast.data.loader import ClipLoader
from opensora_fast.data.manifest import Manifest

CLIPS, FRAMES, INTERVAL = 4, 16, 3
SOURCE_FRAMES = 60
SIZES = {"144p": (144, 256), "240p": (240, 426), "720p": (720, 1280)}
CODEC_ENDINGS = {"h264": ".mp4", "vp9": ".webm"}
PROVIDERS = [("pyav", "cpu", "h264"), ("pyav", "cpu", "vp9"), ("dali", "cpu", "vp9")]
PROVIDERS += [("dali", "gpu", "h264"), ("dali", "gpu", "vp9")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same 60 frames in each resolution and codec."""
    folder = tmp_path_factory.mktemp("decode")
    cuts = [
        Cut(f"{name}{ending}", CARTOON, "", (0, SOURCE_FRAMES), size=size)
        for name, size in SIZES.items()
        for ending in CODEC_ENDINGS.values()
    ]
    transcode(find_source_videos()[CARTOON], cuts, folder, on_file=lambda: None)
    return folder


@pytest.mark.parametrize("resolution", SIZES)
@pytest.mark.parametrize(("name", "device", "codec"), PROVIDERS, ids=["-".join(provider) for provider in PROVIDERS])
def test_decode(benchmark, folder, name, device, codec, resolution):
    if name == "dali" and not is_dali_installed():
        pytest.skip("DALI is not installed")
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    decoder = PyAVDecoder() if name == "pyav" else DaliDecoder(device)
    assert name == "pyav" or codec in CODECS[device]
    numbers = tuple(np.linspace(0, FRAMES * INTERVAL - 1, FRAMES, dtype=int).tolist())
    path = str(folder / f"{resolution}{CODEC_ENDINGS[codec]}")
    requests = [ClipRequest(row, path, numbers, SIZES[resolution]) for row in range(CLIPS)]

    used = []

    def decode():
        before = time.process_time()
        results = decoder.decode(requests)
        if device == "gpu":
            torch.cuda.synchronize()
        used.append(time.process_time() - before)
        return results

    results = benchmark.pedantic(decode, rounds=3, warmup_rounds=1)
    decoder.close()
    assert not [result for result in results if isinstance(result, BadClip)]
    seconds = benchmark.stats.stats.median
    benchmark.group = f"decode {resolution}"
    benchmark.extra_info |= {
        "decoded_frames_per_s": round(CLIPS * (numbers[-1] + 1) / seconds, 1),
        "decoded_frames_per_processor_s": round(CLIPS * (numbers[-1] + 1) / min(used), 1),
        "kept_frames_per_s": round(CLIPS * FRAMES / seconds, 1),
        "threads": count_processors(),
    }


def test_loader(benchmark, folder):
    """Mixed resolutions through the loader; the consumer takes no time, so the loader should use every processor."""
    rows = [
        {"path": f"{name}.mp4", "text": "", "num_frames": SOURCE_FRAMES, "height": size[0], "width": size[1], "fps": 25}
        for name, size in SIZES.items()
        for _ in range(4)
    ]
    bucket = Bucket({"720p": {FRAMES: (1.0, 1)}, "240p": {FRAMES: (1.0, 2)}, "144p": {FRAMES: (1.0, 4)}})
    manifest = Manifest(pd.DataFrame(rows), folder=folder)
    sampler = BucketSampler(manifest, bucket, frame_interval=INTERVAL, seed=0)
    loader = ClipLoader(manifest, sampler, PyAVDecoder(), seed=0)
    used = []

    def run():
        wall, processor = time.perf_counter(), time.process_time()
        frames = sum(len(batch) * FRAMES for batch in loader.load(sampler.iterate(0, 0)))
        used.append((time.process_time() - processor) / (time.perf_counter() - wall))
        return frames

    frames = benchmark.pedantic(run, rounds=2, warmup_rounds=1)
    loader.close()
    benchmark.group = "loader"
    benchmark.extra_info |= {
        "kept_frames_per_s": round(frames / benchmark.stats.stats.median, 1),
        "processors_used": round(max(used), 2),
        "processors": count_processors(),
    }
