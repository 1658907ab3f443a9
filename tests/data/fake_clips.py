"""A loader over clips that need no files: each holds the numbers of its frames."""

import threading

import pandas as pd
import torch

from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.decoding.clips import BadClip
from opensora_fast.data.loader import ClipLoader
from opensora_fast.data.manifest import Manifest

BUCKETS = Bucket({"144p": {1: (1.0, 2), 4: (1.0, 2), 8: (1.0, 2)}})
INTERVAL = 2


class FakeDecoder:
    """Clips that hold the numbers of their frames; rows in `bad` cannot be decoded."""

    def __init__(self, bad=(), threads=1):
        self.threads = threads
        self.calls = []
        self.bad = set(bad)
        self.requests = []
        self.closed = False

    def decode(self, requests):
        self.calls.append(len(requests))
        self.requests += requests
        return [
            BadClip(request.row, request.path, "made bad")
            if request.row in self.bad
            else torch.tensor(request.frames).float().view(1, -1, 1, 1).expand(3, -1, *request.size).contiguous()
            for request in requests
        ]

    def close(self):
        self.closed = True


class GatedDecoder(FakeDecoder):
    """Decodes while `gate` is set, as it is at first, and else waits for that."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, requests):
        assert self.gate.wait(30)
        return super().decode(requests)


def make_manifest(folder=".", videos=12, images=4):
    rows = [
        {"path": f"{n}.mp4", "text": f"video {n}", "num_frames": 20 + n, "height": 144, "width": 256, "fps": 10.0 + n}
        for n in range(videos)
    ]
    rows += [
        {"path": f"{n}.png", "text": f"image {n}", "num_frames": 1, "height": 160, "width": 240, "fps": 25.0}
        for n in range(images)
    ]
    return Manifest(pd.DataFrame(rows), folder=folder)


def make_loader(decoder, manifest=None, *, sampler_options=None, **options):
    manifest = manifest or make_manifest()
    sampler = BucketSampler(manifest, BUCKETS, frame_interval=INTERVAL, seed=3, **(sampler_options or {}))
    options = {"seed": 3, "report": lambda text: None, **options}
    return ClipLoader(manifest, sampler, decoder, **options)


def take_epoch(loader, epoch=0):
    return list(loader.load(loader.sampler.iterate(epoch, 0)))


def summarize(batches):
    return [(batch.index, batch.epoch, batch.bucket, batch.rows, batch.video.sum().item()) for batch in batches]
