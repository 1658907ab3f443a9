"""Balanced order: the same micro-batches in an order in which processes wait little, whatever their number."""

from types import SimpleNamespace

import numpy as np
import pytest
from golden_buckets import bucket_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.costs.idle import idle_share
from opensora_fast.data import Bucket
from opensora_fast.data.buckets.balance import BLOCKS, WINDOW, balance
from opensora_fast.data.buckets.plan import plan_epoch
from opensora_fast.data.buckets.sampler import BucketSampler


def draw_costs(count: int, seed: int, kinds: int = 12) -> np.ndarray:
    """Micro-batches of several kinds in random order; the costliest costs twenty times the cheapest."""
    generator = np.random.default_rng(seed)
    return np.exp(generator.uniform(0, 3, kinds))[generator.integers(0, kinds, count)]


@settings(max_examples=100)
@given(st.integers(0, 5000), st.integers(0, 2**32), st.integers(1, 40))
def test_it_is_a_permutation_and_the_same_again(count, seed, kinds):
    costs = draw_costs(count, seed, kinds)
    order = balance(costs, seed, 0)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, balance(costs, seed, 0))


def test_the_order_is_fixed_for_all_time():
    """A stored position must mean the same clips in every later version. Two blocks of 8, and 4 more."""
    costs = np.arange(20) % 7
    assert balance(costs, 1, 2).tolist() == [4, 11, 18, 5, 12, 19, 6, 13, 0, 7, 14, 1, 8, 15, 2, 9, 16, 3, 10, 17]
    assert balance(costs, 1, 3).tolist() == [0, 7, 14, 1, 8, 15, 2, 9, 4, 11, 18, 5, 12, 19, 6, 13, 16, 3, 10, 17]


def test_it_does_not_depend_on_the_unit_of_cost():
    costs = draw_costs(4000, seed=1)
    assert np.array_equal(balance(costs, 0, 0), balance(1e3 * costs, 0, 0))


@pytest.mark.parametrize("size", BLOCKS)
def test_each_block_is_a_run_of_the_window_sorted_by_cost(size):
    """So a step of as many processes holds what is as alike as it can be."""
    order = balance(np.arange(WINDOW, dtype=float)[::-1].copy(), 3, 0)
    ranks = np.sort((WINDOW - 1 - order).reshape(-1, size), axis=1)
    assert (ranks == ranks[:, :1] + np.arange(size)).all() and (ranks[:, 0] % size == 0).all()


def test_every_window_takes_its_share_of_every_kind():
    costs = draw_costs(3 * WINDOW, seed=2)
    order = balance(costs, 0, 0)
    for first in range(0, len(costs), WINDOW):
        window = slice(first, first + WINDOW)
        assert np.array_equal(np.sort(order[window]), np.arange(len(costs))[window])


def test_within_a_window_no_cost_comes_early_or_late():
    """Mean place of the cheapest and of the costliest quarter, over many epochs: the middle."""
    costs = np.sort(draw_costs(16 * BLOCKS[0], seed=0))
    quarter = len(costs) // 4
    places = np.mean([np.argsort(balance(costs, seed, 0)) for seed in range(60)], axis=0) / len(costs)
    assert places[:quarter].mean() == pytest.approx(0.5, abs=0.05)
    assert places[-quarter:].mean() == pytest.approx(0.5, abs=0.05)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(2, 512), st.integers(4, 60))
def test_processes_never_wait_longer_in_expectation(seed, kinds, world_size, steps):
    """Mean of ten epochs of at least four steps, any number of processes and kinds."""
    costs = draw_costs(world_size * steps, seed, kinds)
    plain, balanced = [], []
    for epoch in range(10):
        shuffled = np.random.default_rng(epoch).permutation(costs)
        plain.append(idle_share(shuffled, world_size))
        balanced.append(idle_share(shuffled[balance(shuffled, epoch, 0)], world_size))
    assert np.mean(balanced) <= np.mean(plain) + 1e-9


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(2, 512))
def test_in_a_long_epoch_processes_wait_half_as_long_at_most(seed, kinds, world_size):
    costs = draw_costs(WINDOW, seed, kinds)
    balanced = costs[balance(costs, seed, 0)]
    assert idle_share(balanced, world_size) <= 0.5 * idle_share(costs, world_size)


@pytest.mark.parametrize("world_size", [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512])
def test_usual_numbers_of_processes_wait_for_less_than_four_percent(world_size):
    costs = draw_costs(2 * WINDOW, seed=7, kinds=30)
    assert idle_share(costs, world_size) > 0.3
    assert idle_share(costs[balance(costs, 0, 0)], world_size) < 0.04


def test_a_table_of_one_step_waits_as_long_as_before():
    costs = draw_costs(64, seed=5)
    assert idle_share(costs[balance(costs, 0, 0)], 64) == pytest.approx(idle_share(costs, 64))


# ---- the plan and the sampler ----


@st.composite
def plans(draw):
    """A random table and configuration with a cost for each bucket."""
    count, generator = draw(st.integers(1, 300)), np.random.default_rng(draw(st.integers(0, 1000)))
    sizes = np.array([(144, 256), (240, 426), (720, 1280)])[generator.integers(0, 3, count)]
    clips = SimpleNamespace(num_frames=generator.choice([1, 40, 120], count), height=sizes[:, 0], width=sizes[:, 1])
    bucket = Bucket(draw(bucket_configs()))
    return clips, bucket, generator.uniform(1, 30, len(bucket))


def pairs_of(plan) -> list[tuple[int, int]]:
    return list(zip(plan.bucket_of.tolist(), plan.number_of.tolist(), strict=True))


@settings(max_examples=60)
@given(plans(), st.integers(0, 2**40), st.integers(0, 3))
def test_a_balanced_epoch_has_the_same_micro_batches(given_, seed, epoch):
    clips, bucket, costs = given_
    plain = plan_epoch(clips, bucket, seed=seed, epoch=epoch)
    balanced = plan_epoch(clips, bucket, seed=seed, epoch=epoch, costs=costs)
    assert sorted(pairs_of(balanced)) == sorted(pairs_of(plain))
    assert np.array_equal(balanced.rows, plain.rows) and np.array_equal(balanced.first, plain.first)
    again = plan_epoch(clips, bucket, seed=seed, epoch=epoch, costs=costs)
    assert pairs_of(again) == pairs_of(balanced)


def test_epochs_and_seeds_differ():
    clips = SimpleNamespace(num_frames=np.tile([1, 40], 500), height=np.full(1000, 240), width=np.full(1000, 426))
    bucket = Bucket({"144p": {1: (0.5, 4), 16: (0.5, 2)}, "240p": {1: (0.5, 4), 16: (0.5, 2)}})
    costs = np.linspace(1, 9, len(bucket))
    orders = {
        tuple(pairs_of(plan_epoch(clips, bucket, seed=seed, epoch=epoch, costs=costs)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@settings(max_examples=30)
@given(plans(), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_another_number_of_processes_goes_on_in_the_same_order(given_, before, after, drop_last, data):
    """Without `drop_last` nothing is lost; with it what does not fill a step at the end."""
    clips, bucket, costs = given_

    def make(world_size: int) -> list[BucketSampler] | None:
        try:
            return [
                BucketSampler(clips, bucket, rank=rank, world_size=world_size, costs=costs, drop_last=drop_last)
                for rank in range(world_size)
            ]
        except ValueError:
            return None

    (alone,), first, second = make(1) or (None,), make(before), make(after)
    if alone is None or first is None or second is None:
        return
    whole = [(batch.bucket, batch.rows) for batch in alone.iterate(0, 0)]
    steps = data.draw(st.integers(0, len(whole) // before))
    iterators = [sampler.iterate(0, 0) for sampler in first]
    taken = [next(iterator) for _ in range(steps) for iterator in iterators]
    iterators = [sampler.iterate(0, steps * before) for sampler in second]
    rest = [batch for step in zip(*iterators, strict=True) for batch in step]
    seen = [(batch.bucket, batch.rows) for batch in taken + rest]
    if drop_last:
        assert seen == whole[: len(seen)] and len(whole) - len(seen) < after
    else:
        assert seen[: len(whole)] == whole
