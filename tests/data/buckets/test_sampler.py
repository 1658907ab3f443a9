"""BucketSampler: what is used, order, processes, resuming, replacements. Random tables and configurations."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from golden_buckets import bucket_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.data import Bucket
from opensora_fast.data.buckets.assignment import assign_buckets
from opensora_fast.data.buckets.plan import count_steps, plan_epoch
from opensora_fast.data.buckets.sampler import BucketSampler, MicroBatch

CONFIG = {"144p": {1: (1.0, 4), 16: (0.5, 3)}, "240p": {1: (0.5, 2), 16: (1.0, 3), 32: (0.8, 1)}}


def make_clips(count: int, seed: int = 0) -> SimpleNamespace:
    """A table with few different shapes, so that buckets hold more than one clip."""
    generator = np.random.default_rng(seed)
    sizes = np.array([(144, 256), (240, 426), (320, 320), (720, 1280)])[generator.integers(0, 4, count)]
    return SimpleNamespace(num_frames=generator.choice([1, 10, 40, 120], count), height=sizes[:, 0], width=sizes[:, 1])


def make_sampler(count: int = 200, config: dict | None = None, **arguments) -> BucketSampler:
    arguments = {"frame_interval": 2, "seed": 5, **arguments}
    return BucketSampler(make_clips(count), Bucket(config or CONFIG), **arguments)


def take_epoch(sampler: BucketSampler, epoch: int = 0, consumed: int = 0) -> list[MicroBatch]:
    return list(sampler.iterate(epoch, consumed))


def interleave(samplers: list[BucketSampler], consumed: int = 0) -> list[MicroBatch]:
    """The micro-batches of all processes in global order, step by step."""
    iterators = [sampler.iterate(0, consumed) for sampler in samplers]
    return [batch for step in zip(*iterators, strict=True) for batch in step]


tables = st.builds(make_clips, st.integers(1, 120), st.integers(0, 1000))


@st.composite
def samplers(draw):
    """A function that makes samplers over a random table; arguments such as rank come later."""
    clips, bucket = draw(tables), Bucket(draw(bucket_configs()))
    fixed = {
        "frame_interval": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**40)),
        "drop_last": draw(st.booleans()),
    }

    def make(**arguments) -> BucketSampler | None:
        try:
            return BucketSampler(clips, bucket, **{**fixed, **arguments})
        except ValueError as error:
            assert "micro-batch" in str(error)
            return None

    return make


@settings(max_examples=60)
@given(samplers(), st.integers(0, 3))
def test_every_clip_is_used_as_often_as_the_rules_say(make, epoch):
    sampler = make()
    if sampler is None:
        return
    clips = sampler.clips
    assigned = assign_buckets(
        clips.num_frames,
        clips.height,
        clips.width,
        sampler.bucket,
        frame_interval=sampler.frame_interval,
        seed=sampler.seed,
        epoch=epoch,
    )
    batches = take_epoch(sampler, epoch)
    assert [batch.index for batch in batches] == list(range(len(batches)))
    used = Counter()
    batches_of = Counter(batch.bucket for batch in batches)
    for batch in batches:
        assert batch.epoch == epoch
        assert len(batch.rows) == sampler.bucket.get_batch_size(batch.bucket)
        assert all(sampler.bucket.ids[assigned[row]] == batch.bucket for row in batch.rows)
        used.update(batch.rows)
    for index, bucket_id in enumerate(sampler.bucket.ids):
        members = np.flatnonzero(assigned == index).tolist()
        if not members:
            continue
        size = sampler.bucket.get_batch_size(bucket_id)
        times = [used[row] for row in members]
        if sampler.drop_last:
            assert batches_of[bucket_id] == len(members) // size
            assert max(times) <= 1 and sum(times) == len(members) // size * size
        else:
            assert batches_of[bucket_id] == -(-len(members) // size)
            # Filled up evenly: no clip is used twice more often than another.
            assert min(times) >= 1 and max(times) - min(times) <= 1
    assert sum(used.values()) == sum(len(batch.rows) for batch in batches)


@settings(max_examples=60)
@given(samplers())
def test_any_number_of_processes_sees_the_same_global_order(make):
    single = make()
    if single is None:
        return
    whole = take_epoch(single)
    for world_size in (1, 2, 3, 4, 8):
        ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
        if ranks[0] is None:
            assert single.drop_last and len(whole) < world_size
            continue
        merged = interleave(ranks)
        if single.drop_last:
            assert merged == whole[: len(whole) // world_size * world_size]
        else:
            assert len(merged) == -(-len(whole) // world_size) * world_size
            assert merged[: len(whole)] == whole
            for batch in merged[len(whole) :]:
                first = whole[batch.index % len(whole)]
                assert (batch.rows, batch.bucket) == (first.rows, first.bucket)
        assert [batch.index for batch in merged] == list(range(len(merged)))
        steps = len(merged) // world_size
        assert ranks[0].explain().steps == steps
        assert count_steps(len(whole), world_size, single.drop_last) == steps


@settings(max_examples=40)
@given(samplers(), st.data())
def test_resume_at_any_point_with_any_number_of_processes(make, data):
    worlds = st.sampled_from([1, 2, 3, 4, 8])
    before, after = data.draw(worlds), data.draw(worlds)
    first = [make(rank=rank, world_size=before) for rank in range(before)]
    second = [make(rank=rank, world_size=after) for rank in range(after)]
    if first[0] is None or second[0] is None:
        return
    whole = take_epoch(make())
    ranks = [take_epoch(sampler) for sampler in first]
    steps = data.draw(st.integers(1, len(ranks[0])))
    consumed = {batches[steps - 1].index - rank + before for rank, batches in enumerate(ranks)}
    assert consumed == {steps * before}
    rest = interleave(second, steps * before)
    expected = whole[steps * before :]
    if first[0].drop_last:
        expected = expected[: len(expected) // after * after]
    assert rest[: len(expected)] == expected
    assert len(rest) - len(expected) < after


def test_nothing_is_left_of_an_epoch_that_is_used_up():
    sampler = make_sampler(rank=1, world_size=3)
    last = take_epoch(sampler)[-1]
    assert take_epoch(sampler, consumed=last.index - 1 + 3) == []


def test_same_seed_same_order_other_seed_or_epoch_another():
    first, again, other = make_sampler(), make_sampler(), make_sampler(seed=6)
    whole = take_epoch(first)
    assert [batch.rows for batch in whole] != [batch.rows for batch in take_epoch(other)]
    assert [batch.rows for batch in whole] != [batch.rows for batch in take_epoch(again, 1)]
    assert whole == take_epoch(first) == take_epoch(again)


def test_order_is_fixed_for_all_time():
    """A stored position must mean the same clips in every later version, of NumPy too."""
    clips = SimpleNamespace(num_frames=np.full(12, 40), height=np.full(12, 144), width=np.full(12, 256))
    sampler = BucketSampler(clips, Bucket({"144p": {16: (0.8, 2)}}), seed=1)
    assert [batch.rows for batch in take_epoch(sampler)] == [(10, 6), (4, 5), (3, 1), (9, 2), (0, 11)]


def test_the_clips_that_drop_last_leaves_out_change():
    clips = SimpleNamespace(num_frames=np.full(10, 40), height=np.full(10, 144), width=np.full(10, 256))
    sampler = BucketSampler(clips, Bucket({"144p": {16: (1.0, 4)}}), drop_last=True)
    assert {row for epoch in range(10) for batch in take_epoch(sampler, epoch) for row in batch.rows} == set(range(10))


def test_one_clip_fills_a_whole_micro_batch():
    clips = SimpleNamespace(num_frames=np.array([40]), height=np.array([144]), width=np.array([256]))
    (batch,) = take_epoch(BucketSampler(clips, Bucket({"144p": {16: (1.0, 6)}}), drop_last=False))
    assert batch.rows == (0,) * 6


def test_without_shuffle_the_table_keeps_its_order():
    bucket = Bucket({"144p": {16: (1.0, 1)}})
    costs = -np.arange(len(bucket), dtype=float)  # change nothing
    plan = plan_epoch(make_clips(200), bucket, frame_interval=2, shuffle=False, costs=costs)
    rows = [row for index in range(len(plan)) for row in plan.get_rows(index)]
    assert len(rows) > 20 and len(set(plan.assigned[rows])) > 1
    assert rows == sorted(rows, key=lambda row: (plan.assigned[row], row))


@settings(max_examples=40)
@given(samplers(), st.data())
def test_replacements_are_all_other_clips_of_the_bucket(make, data):
    sampler, replay = make(), make()
    if sampler is None:
        return
    batch = data.draw(st.sampled_from(take_epoch(sampler)))
    row = data.draw(st.sampled_from(batch.rows))
    assigned = sampler.get_plan(0).assigned
    others = set(np.flatnonzero(assigned == assigned[row]).tolist()) - {row}
    found = [sampler.replacement(batch, row, attempt) for attempt in range(len(others))]
    assert len(found) == len(set(found)) and set(found) == others
    inside = [other in batch.rows for other in found]
    assert inside == sorted(inside), "clips outside the micro-batch come first"
    assert found == [replay.replacement(batch, row, attempt) for attempt in range(len(others))]
    with pytest.raises(ValueError, match="no further clip"):
        sampler.replacement(batch, row, len(others))


def test_bad_clips_of_a_micro_batch_hardly_ever_get_the_same_replacement():
    clips = SimpleNamespace(num_frames=np.full(500, 40), height=np.full(500, 144), width=np.full(500, 256))
    sampler = BucketSampler(clips, Bucket({"144p": {16: (1.0, 8)}}))
    batch = take_epoch(sampler)[0]
    assert len({sampler.replacement(batch, row, 0) for row in batch.rows}) >= 7


def test_replacement_after_the_sampler_moved_on():
    sampler = make_sampler()
    batch = take_epoch(sampler)[3]
    expected = sampler.replacement(batch, batch.rows[0], 0)
    for epoch in (1, 2, 3):
        next(sampler.iterate(epoch, 0))
    assert sampler.replacement(batch, batch.rows[0], 0) == expected


@settings(max_examples=40, deadline=None)
@given(samplers(), st.data())
def test_substitutes_are_the_next_of_each_other_bucket_under_the_number_of_the_batch(make, data):
    sampler = make()
    if sampler is None:
        return
    whole = take_epoch(sampler)
    batch = data.draw(st.sampled_from(whole))
    of_each_bucket = {}
    for other in whole[batch.index :] + whole[: batch.index]:
        of_each_bucket.setdefault(other.bucket, other)
    del of_each_bucket[batch.bucket]
    # The number may lie past the end, where the last step is filled up.
    for index in (batch.index, batch.index + len(whole)):
        expected = [replace(other, index=index) for other in of_each_bucket.values()]
        assert list(sampler.substitutes(replace(batch, index=index))) == expected


def test_nothing_to_do_is_an_error_with_counts_and_fix():
    clips = SimpleNamespace(
        num_frames=np.array([40, 40, 1, 5]), height=np.array([144, 144, 144, 10]), width=np.array([256, 256, 256, 10])
    )
    with pytest.raises(ValueError) as caught:
        BucketSampler(clips, Bucket({"144p": {16: (1.0, 3)}}), drop_last=True)
    message = str(caught.value)
    assert "no micro-batch from 4 clips" in message
    assert "144p, 16 frames, 0.56: 2 clips, batch size 3" in message
    assert "1 clip, an image" in message and "1 clip, fewer than 0.8 times the pixels" in message
    assert "lower the batch sizes" in message and "drop_last=False" in message
    with pytest.raises(ValueError, match="4 clips(.|\n)*add a resolution or frame count"):
        BucketSampler(clips, Bucket({"4k": {16: (1.0, 3)}}))


def test_more_processes_than_micro_batches():
    with pytest.raises(ValueError, match="micro-batches cannot serve 100 processes"):
        make_sampler(50, world_size=100, drop_last=True)
    assert all(len(take_epoch(make_sampler(50, world_size=100, rank=rank))) == 1 for rank in (0, 99))


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="rank 2 and world_size 2"):
        make_sampler(rank=2, world_size=2)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_steps_to_the_end_of_all_epochs_are_known_where_no_draw_changes_them(drop_last):
    config = {"144p": {1: (1.0, 4), 16: (1.0, 3)}, "240p": {1: (0.0, 2), 16: (1.0, 3)}}
    options = {"rank": 1, "world_size": 3, "drop_last": drop_last}
    sampler = make_sampler(config=config, **options)
    for epoch, consumed in ((0, 0), (1, 7), (1, 300), (3, 2), (4, 0)):  # 300: more than there are, filled up
        places = [(number, consumed if number == epoch else 0) for number in range(epoch, 4)]
        steps = sum(len(take_epoch(sampler, *place)) for place in places)
        assert sampler.count_steps_left(4, epoch, consumed) == steps
    assert make_sampler(**options).count_steps_left(4, 0, 0) is None
