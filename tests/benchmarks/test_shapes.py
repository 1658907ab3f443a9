"""Workloads and packs: the published sizes, and shorter versions of the same kind for checks."""

import pytest

from opensora_fast.benchmarks.shapes import IMAGE_SIZES, VIDEO_SIZES, Pack, Workload, fill, stage_buckets, text_lengths


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("144p", 144),
        ("240p", 405),
        ("360p", 920),
        ("480p", 1590),
        ("720p", 3600),
        ("256", 256),
        ("512", 1024),
        ("1024", 4096),
    ],
)
def test_tokens_of_a_frame(name, tokens):
    assert Workload(name, 1).frame_tokens == tokens
    assert name in VIDEO_SIZES | IMAGE_SIZES


def test_a_filled_workload_comes_near_to_its_tokens():
    assert fill("240p", 16, 32768) == Workload("240p", 16, 5)
    assert fill("720p", 64, 32768).batch == 1  # one video at least


def test_a_mixed_pack_lists_its_videos():
    pack = Pack("mixed", (Workload("144p", 16, 2), Workload("256", 1, 1)))
    assert pack.shapes == [(16, 9, 16), (16, 9, 16), (1, 16, 16)]
    assert pack.tokens == 2 * 16 * 144 + 256
    assert not pack.is_uniform and Pack.of(Workload("144p", 16, 2)).is_uniform
    assert pack.text == "B=2 T=16 S=144 + B=1 T=1 S=256"


@pytest.mark.parametrize(
    "workload", [Workload("144p", 16, 14), Workload("240p", 16, 5), Workload("720p", 16, 1), Workload("1024", 1, 8)]
)
def test_a_shortened_pack_keeps_frames_and_kinds(workload):
    pack = Pack.of(workload)
    short = pack.shortened(8192)
    assert short.tokens < pack.tokens and short.tokens <= max(8192, 2 * workload.frame_tokens)
    (part,) = short.parts
    assert part.resolution == workload.resolution
    assert part.frames >= min(workload.frames, 2)
    assert short.shortened(8192) is short


def test_a_small_pack_is_not_shortened():
    pack = Pack.of(Workload("144p", 2, 1))
    assert pack.shortened(8192) is pack and pack.shortened(200) is pack


def test_stages_are_the_shipped_ones():
    assert Workload("144p", 16, 6) in stage_buckets("stage1")
    assert Workload("720p", 16, 3) in stage_buckets("stage3")
    assert all(workload.batch for stage in ("stage1", "stage2", "stage3") for workload in stage_buckets(stage))


def test_captions_are_ragged_around_their_mean():
    assert text_lengths(1, 120) == [120]
    assert text_lengths(3, 120) == [96, 120, 144]
    assert len(set(text_lengths(5, 6))) > 1 and min(text_lengths(5, 6)) > 0
