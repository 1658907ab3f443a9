"""Vectorised assignment: the same buckets as one clip at a time, and why clips are dropped."""

import numpy as np
import pytest
from golden_buckets import bucket_configs, read_golden_buckets
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.data import Bucket
from opensora_fast.data.buckets.assignment import (
    BLOCK_ROWS,
    DROPPED,
    LOST_DRAW,
    NO_IMAGE_BUCKET,
    TOO_SHORT,
    TOO_SMALL,
    assign_buckets,
    find_drop_reasons,
)


def assign_one_by_one(num_frames, height, width, bucket, frame_interval, seed, epoch, first_row=0):
    return [
        bucket.get_bucket_id(
            int(t), int(h), int(w), frame_interval, seed + epoch + (first_row + row) * bucket.num_bucket
        )
        for row, (t, h, w) in enumerate(zip(num_frames, height, width, strict=True))
    ]


def to_ids(assigned, bucket):
    return [None if index == DROPPED else bucket.ids[index] for index in assigned]


clips = st.lists(
    st.tuples(
        st.one_of(st.just(1), st.integers(2, 20), st.integers(2, 700)), st.integers(20, 2400), st.integers(20, 4200)
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150)
@given(
    bucket_configs(),
    clips,
    st.integers(1, 5),
    st.sampled_from([0, 42, 1024, 2**32 - 3, 2**40]),
    st.integers(0, 9),
)
def test_equal_to_one_by_one(config, clips, frame_interval, seed, epoch):
    bucket = Bucket(config)
    num_frames, height, width = np.array(clips).T
    assigned = assign_buckets(num_frames, height, width, bucket, frame_interval=frame_interval, seed=seed, epoch=epoch)
    assert assigned.dtype == np.int32
    expected = assign_one_by_one(num_frames, height, width, bucket, frame_interval, seed, epoch)
    assert to_ids(assigned, bucket) == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_more_rows_than_a_block(stage):
    bucket = Bucket(read_golden_buckets(stage)[0])
    generator = np.random.default_rng(stage)
    count = BLOCK_ROWS + 1000
    num_frames = np.where(generator.random(count) < 0.3, 1, generator.integers(2, 500, count)).astype(np.int32)
    height = generator.integers(100, 1500, count).astype(np.int16)
    width = generator.integers(100, 2700, count).astype(np.uint32)
    assigned = assign_buckets(num_frames, height, width, bucket, frame_interval=3, seed=7)
    tail = slice(BLOCK_ROWS - 300, BLOCK_ROWS + 300)
    expected = assign_one_by_one(
        num_frames[tail], height[tail], width[tail], bucket, 3, 7, 0, first_row=BLOCK_ROWS - 300
    )
    assert to_ids(assigned[tail], bucket) == expected


def test_a_resolution_is_open_from_0_8_of_its_pixels():
    bucket = Bucket({"240p": {1: (0.0, None)}, "144p": {16: (1.0, 1)}})
    columns = np.array([1, 1]), np.array([284, 284]), np.array([288, 287])  # 81,792 pixels are 0.8 of 102,240
    assert find_drop_reasons(*columns, bucket).tolist() == [LOST_DRAW, NO_IMAGE_BUCKET]
    kept = assign_buckets(*columns, Bucket({"240p": {1: (1.0, 1)}}))
    assert (kept != DROPPED).tolist() == [True, False]


def test_pixels_are_counted_beyond_the_dtype_of_a_column():
    bucket = Bucket({"144p": {16: (1.0, 1)}})
    columns = np.array([20, 20], np.int32), np.array([65536, 200], np.int32), np.array([65536, 200], np.int32)
    assert (assign_buckets(*columns, bucket) != DROPPED).all()
    columns = np.array([1, 1], np.int32), *columns[1:]
    assert find_drop_reasons(*columns, bucket).tolist() == [NO_IMAGE_BUCKET] * 2


def test_every_epoch_draws_anew():
    bucket = Bucket({"256": {16: (0.5, 2)}})
    columns = np.full(200, 20), np.full(200, 720), np.full(200, 1280)
    first, again, second = (assign_buckets(*columns, bucket, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def test_drop_reasons():
    bucket = Bucket({"256": {16: (0.0, 2)}, "512": {1: (0.0, None), 8: (1.0, 1)}})
    num_frames = np.array([20, 1, 8, 5, 1])
    height = np.array([100, 256, 256, 512, 512])
    width = np.array([100, 256, 256, 512, 512])
    assert (assign_buckets(num_frames, height, width, bucket) == DROPPED).all()
    reasons = find_drop_reasons(num_frames, height, width, bucket)
    assert reasons.tolist() == [TOO_SMALL, NO_IMAGE_BUCKET, TOO_SHORT, TOO_SHORT, LOST_DRAW]


def test_no_rows():
    empty = np.empty(0, int)
    assert assign_buckets(empty, empty, empty, Bucket({"256": {16: (0.5, 2)}})).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": np.array([1.0, 2.0])}, "num_frames must be.*integers.*float64"),
        ({"height": np.array([1, 2, 3])}, "height must be a row of 2"),
        ({"seed": -1}, "negative"),
        ({"epoch": -1}, "negative"),
        ({"seed": 2**64 - 2}, "too large"),
        ({"frame_interval": 0}, "frame_interval"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"num_frames": np.array([1, 2]), "height": np.array([9, 9]), "width": np.array([9, 9]), **changes}
    with pytest.raises(ValueError, match=message):
        assign_buckets(bucket=Bucket({"256": {16: (0.5, 2)}}), **arguments)
