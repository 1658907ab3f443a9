"""Bucket: golden files, the rules one by one, broken tables."""

import pytest
from golden_buckets import read_golden_buckets

from opensora_fast.data import Bucket


@pytest.mark.parametrize("stage", [1, 3])
def test_golden_buckets(stage):
    config, rows = read_golden_buckets(stage)
    bucket = Bucket(config)
    assert len(rows) == 400
    for row in rows:
        bucket_id = bucket.get_bucket_id(row["T"], row["H"], row["W"], row["frame_interval"], row["seed"])
        assert bucket_id == (tuple(row["bucket"]) if row["bucket"] else None)
        if bucket_id is not None:
            assert list(bucket.get_thw(bucket_id)) == row["thw"]
            assert bucket.get_batch_size(bucket_id) == bucket.get_batch_size(bucket_id[:2]) == row["batch_size"]


def test_number_and_order_of_buckets():
    bucket = Bucket({"144p": {1: (1.0, 8), 16: (1.0, 2)}, "256": {16: (0.5, 1)}})
    assert len(bucket) == bucket.num_bucket == len(bucket.ids) == 40 + 17 + 17
    assert bucket.ids[0] == ("256", 16, "0.25")
    assert bucket.ids[40] == ("144p", 16, "0.38")
    assert bucket.ids[57] == ("144p", 1, "0.38")


def test_a_video_must_be_strictly_longer_than_frames_times_interval():
    bucket = Bucket({"144p": {16: (1.0, 2)}})
    assert bucket.get_bucket_id(48, 144, 256, frame_interval=3) is None
    assert bucket.get_bucket_id(49, 144, 256, frame_interval=3) == ("144p", 16, "0.56")


def test_images_and_videos_never_mix():
    bucket = Bucket({"144p": {1: (1.0, 2)}})
    assert bucket.get_bucket_id(1, 144, 256) == ("144p", 1, "0.56")
    assert bucket.get_bucket_id(300, 144, 256) is None
    assert Bucket({"144p": {16: (1.0, 2)}}).get_bucket_id(1, 144, 256) is None


def test_a_resolution_is_open_from_0_8_of_its_pixels():
    bucket = Bucket({"256": {1: (1.0, 1)}})
    assert bucket.get_bucket_id(1, 128, 410) is not None  # 52,480 pixels of 52,428.8
    assert bucket.get_bucket_id(1, 128, 409) is None
    assert Bucket({"240p": {1: (1.0, 1)}}).get_bucket_id(1, 284, 288) is not None  # 81,792 pixels are 0.8 of 102,240


def test_a_lost_draw_skips_shorter_buckets_of_the_resolution():
    bucket = Bucket({"256": {16: (1.0, 2), 32: (0.0, None)}, "144p": {16: (1.0, 2)}})
    assert bucket.get_bucket_id(40, 720, 1280) == ("144p", 16, "0.56")
    assert bucket.get_bucket_id(32, 720, 1280) == ("256", 16, "0.57")


def test_keep_probability_is_met_on_average():
    bucket = Bucket({"256": {16: (0.3, 2)}})
    kept = sum(bucket.get_bucket_id(20, 720, 1280, seed=seed) is not None for seed in range(4000))
    assert kept / 4000 == pytest.approx(0.3, abs=0.03)


def test_a_seed_is_asked_for_only_when_a_draw_is_needed():
    assert Bucket({"256": {16: (1.0, 2)}}).get_bucket_id(20, 720, 1280) is not None
    with pytest.raises(ValueError, match="256, 16 frames.*seed"):
        Bucket({"256": {16: (0.5, 2)}}).get_bucket_id(20, 720, 1280)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "at least one resolution"),
        ({"240": {16: (1.0, 2)}}, "did you mean '240p'"),
        ({256: {16: (1.0, 2)}}, "quotes"),
        ({"256": {}}, r'bucket_config\["256"\]'),
        ({"256": (1.0, 2)}, r'bucket_config\["256"\]'),
        ({"256": {"16": (1.0, 2)}}, r"256.*whole number.*'16'"),
        ({"256": {16.5: (1.0, 2)}}, "256.*whole number.*16.5"),
        ({"256": {0: (1.0, 2)}}, "256.*whole number.*0"),
        ({"256": {True: (1.0, 2)}}, "256.*whole number.*True"),
        ({"256": {16: (1.5, 2)}}, r'"256"\]\[16\].*between 0 and 1.*1.5'),
        ({"256": {16: (-0.1, 2)}}, r'"256"\]\[16\].*between 0 and 1'),
        ({"256": {16: (float("nan"), 2)}}, r'"256"\]\[16\].*between 0 and 1'),
        ({"256": {16: (True, 2)}}, r'"256"\]\[16\].*between 0 and 1'),
        ({"256": {16: ("half", 2)}}, r'"256"\]\[16\].*between 0 and 1'),
        ({"256": {16: (0.5, None)}}, r'"256"\]\[16\].*no batch size.*set the probability to 0.0'),
        ({"256": {16: (0.5, 0)}}, r'"256"\]\[16\].*batch size.*0'),
        ({"256": {16: (0.5, 2.5)}}, r'"256"\]\[16\].*batch size.*2.5'),
        ({"256": {16: 2}}, r'"256"\]\[16\].*keep probability, batch size'),
        ({"256": {16: (1.0, 2, 3)}}, r'"256"\]\[16\].*keep probability, batch size'),
        ({"256": {16: "ab"}}, r'"256"\]\[16\].*keep probability, batch size'),
    ],
)
def test_broken_tables_name_the_entry_and_the_fix(config, message):
    with pytest.raises(ValueError, match=message):
        Bucket(config)


def test_unknown_ids_are_named():
    bucket = Bucket({"256": {16: (1.0, 2)}})
    with pytest.raises(ValueError, match="no bucket.*32"):
        bucket.get_batch_size(("256", 32))
    with pytest.raises(ValueError, match="no aspect ratio '0.56'"):
        bucket.get_thw(("256", 16, "0.56"))
    with pytest.raises(ValueError, match="resolution, frames, aspect ratio"):
        bucket.get_thw(("256", 16))
    assert bucket.get_prob(("256", 16)) == 1.0
