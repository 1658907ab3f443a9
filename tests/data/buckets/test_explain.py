"""Explanation of a configuration: counts add up, what is left out is named, tokens are those of the model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from golden_buckets import bucket_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.data import Bucket
from opensora_fast.data.buckets.explain import count_tokens, explain_buckets
from opensora_fast.data.buckets.plan import plan_epoch


def make_clips(*rows: tuple[int, int, int]) -> SimpleNamespace:
    num_frames, height, width = np.array(rows).T
    return SimpleNamespace(num_frames=num_frames, height=height, width=width)


def test_a_small_table_by_hand():
    clips = make_clips(*[(40, 144, 256)] * 5, (1, 144, 256), (8, 144, 256), (40, 320, 320), (40, 20, 20))
    bucket = Bucket({"144p": {16: (1.0, 2), 1: (1.0, 2)}, "240p": {16: (1.0, 3)}, "720p": {16: (1.0, 1)}})
    explanation = explain_buckets(clips, bucket, world_size=2, drop_last=True)
    assert (explanation.clips, explanation.used_clips, explanation.micro_batches, explanation.steps) == (9, 4, 2, 1)
    lines = {(line.resolution, line.frames): line for line in explanation.buckets}
    assert {key: (line.clips, line.micro_batches) for key, line in lines.items()} == {
        ("240p", 16): (1, 0),
        ("144p", 16): (5, 2),
        ("144p", 1): (1, 0),
    }
    line = lines["144p", 16]
    assert (line.aspect_ratio, line.height, line.width, line.batch_size) == ("0.56", 144, 256, 2)
    assert line.tokens == 2 * 16 * 9 * 16
    assert sum(explanation.dropped.values()) == 9 - 4
    assert sorted(explanation.dropped.values()) == [1, 1, 3]
    warnings = "\n".join(explanation.warnings)
    assert "240p, 16 frames: batch size 3 is more than the clips of aspect ratio 1.00 (1)" in warnings
    assert "144p, 1 frame: batch size 2" in warnings
    assert "720p, 16 frames: no clip" in warnings
    assert [(pair.resolution, pair.frames) for pair in explanation.get_empty_pairs()] == [
        ("720p", 16),
        ("240p", 16),
        ("144p", 1),
    ]
    text = explanation.to_text()
    assert "4 of 9 clips in 2 micro-batches: 1 step of 2 micro-batches" in text
    assert all(f"warning: {warning}" in text for warning in explanation.warnings)


def test_micro_batches_that_do_not_fill_a_step_are_told():
    clips = make_clips(*[(40, 144, 256)] * 5)
    explanation = explain_buckets(clips, Bucket({"144p": {16: (1.0, 1)}}), world_size=3, drop_last=True)
    assert explanation.steps == 1
    assert explanation.warnings == ["the last 2 micro-batches of the epoch cannot serve 3 processes"]
    filled = explain_buckets(clips, Bucket({"144p": {16: (1.0, 1)}}), world_size=3)
    assert filled.steps == 2 and filled.warnings == []


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 9, 40, 200]), st.integers(50, 1200), st.integers(50, 2000)),
        min_size=1,
        max_size=60,
    ),
    bucket_configs(),
    st.booleans(),
    st.integers(1, 4),
)
def test_counts_add_up_to_the_plan(rows, config, drop_last, world_size):
    clips, bucket = make_clips(*rows), Bucket(config)
    arguments = {"frame_interval": 2, "seed": 3, "epoch": 1, "drop_last": drop_last}
    explanation = explain_buckets(clips, bucket, world_size=world_size, **arguments)
    plan = plan_epoch(clips, bucket, **arguments)
    used = {row for index in range(len(plan)) for row in plan.get_rows(index)}
    assert explanation.micro_batches == len(plan) == sum(line.micro_batches for line in explanation.buckets)
    assert explanation.used_clips == len(used)
    assert explanation.used_clips + sum(explanation.dropped.values()) == explanation.clips == len(rows)
    assert sum(line.clips for line in explanation.buckets) == sum(pair.clips for pair in explanation.pairs)
    assert json.loads(json.dumps(explanation.to_dict()))["micro_batches"] == len(plan)
    assert explanation.to_text()


@pytest.mark.parametrize(
    ("size", "patch", "tokens"),
    [
        ((1, 256, 256), 2, 16 * 16),
        ((16, 240, 426), 2, 16 * 15 * 27),  # 30 x 53 latents: the odd column is padded
        ((1, 141, 260), 2, 9 * 16),  # 17 x 32 latents: what is less than 8 pixels is cut, the odd row padded
        ((16, 240, 426), 8, 16 * 4 * 7),
    ],
)
def test_tokens(size, patch, tokens):
    assert count_tokens(*size, patch) == tokens
