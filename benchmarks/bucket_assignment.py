"""How long it takes to put a large table of clips into buckets, draws included.

`python -m opensora_fast.benchmarks.bucket_assignment --rows 10000000` prints one JSON row for each configuration.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from opensora_fast.data.assignment import DROPPED, assign_buckets
from opensora_fast.data.bucket import Bucket

SEED = 42
FRAME_INTERVAL = 3

# Bucket configurations of Open-Sora's released stages: frames -> (keep probability, batch size).
CONFIGURATIONS = {
    "stage1": {
        "144p": {1: (0.5, 48), 16: (1.0, 6), 32: (1.0, 3), 96: (1.0, 1)},
        "256": {1: (0.5, 24), 16: (0.5, 3), 48: (0.5, 1), 64: (0.0, None)},
        "240p": {16: (0.3, 2), 32: (0.3, 1), 64: (0.0, None)},
        "512": {1: (0.4, 12)},
        "1024": {1: (0.3, 3)},
    },
    "stage3": {
        "144p": {1: (1.0, 200), 16: (1.0, 36), 32: (1.0, 18), 64: (1.0, 9), 128: (1.0, 4)},
        "256": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 11), 64: (0.5, 6), 128: (0.8, 4)},
        "240p": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 10), 64: (0.5, 6), 128: (0.5, 3)},
        "360p": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.5, 1)},
        "512": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.8, 1)},
        "480p": {1: (0.4, 80), 16: (0.6, 6), 32: (0.6, 3), 64: (0.6, 1), 128: (0.0, None)},
        "720p": {1: (0.4, 40), 16: (0.6, 3), 32: (0.6, 1), 96: (0.0, None)},
        "1024": {1: (0.3, 40)},
    },
}


def make_clip_sizes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """num_frames, height and width (pixels) of made-up clips, int32 [rows] each: one in five is an image."""
    generator = np.random.default_rng(seed)
    num_frames = generator.integers(2, 600, rows, dtype=np.int32)
    num_frames[generator.random(rows) < 0.2] = 1
    height = generator.integers(100, 2200, rows, dtype=np.int32)
    width = generator.integers(100, 3900, rows, dtype=np.int32)
    return num_frames, height, width


def measure(configuration: str, rows: int) -> dict:
    """Time one assignment: a row with wall and processor seconds, and the part of the clips that is kept."""
    bucket = Bucket(CONFIGURATIONS[configuration])
    clips = make_clip_sizes(rows)
    wall, processor = time.perf_counter(), time.process_time()
    assigned = assign_buckets(*clips, bucket, frame_interval=FRAME_INTERVAL, seed=SEED)
    return {
        "benchmark": "bucket_assignment",
        "configuration": configuration,
        "rows": rows,
        "seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "kept": round(float((assigned != DROPPED).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    for configuration in CONFIGURATIONS:
        print(json.dumps(measure(configuration, rows)))


if __name__ == "__main__":
    main()
