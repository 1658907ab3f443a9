"""Benchmarks of the assignment to buckets: `pytest benchmarks/test_bucket_assignment.py`, `-m slow` for 10 M rows."""

import numpy as np
import pytest

from opensora_fast.benchmarks.jobs.bucket_assignment import (
    CONFIGURATIONS,
    FRAME_INTERVAL,
    SEED,
    make_clip_sizes,
    measure,
    read_bucket,
)
from opensora_fast.data.buckets.assignment import DROPPED, assign_buckets

CHECKED_ROWS = 200


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_bucket_assignment(benchmark, configuration):
    bucket = read_bucket(configuration)
    clips = make_clip_sizes(100_000)
    assigned = benchmark(assign_buckets, *clips, bucket, frame_interval=FRAME_INTERVAL, seed=SEED)
    for row in np.linspace(0, len(assigned) - 1, CHECKED_ROWS, dtype=int).tolist():
        num_frames, height, width = (int(column[row]) for column in clips)
        expected = bucket.get_bucket_id(num_frames, height, width, FRAME_INTERVAL, SEED + row * bucket.num_bucket)
        assert expected == (None if assigned[row] == DROPPED else bucket.ids[assigned[row]])


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_ten_million_rows_take_well_under_a_minute(configuration):
    assert measure(configuration, 10_000_000)["processor_seconds"] < 30
