"""How long it takes to put a large table of clips into buckets, draws included.

`python -m opensora_fast.benchmarks.jobs.bucket_assignment --rows 10000000` prints one JSON row for each configuration.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from opensora_fast.config import load_train_config
from opensora_fast.data.buckets.assignment import DROPPED, assign_buckets
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.train.locate_config import locate_config

SEED = 42
FRAME_INTERVAL = 3

CONFIGURATIONS = ("stage1", "stage3")


def read_bucket(configuration: str) -> Bucket:
    """The buckets of one of this project's training configurations."""
    return Bucket(load_train_config(locate_config(configuration)).config.bucket_config)


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
    bucket = read_bucket(configuration)
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
