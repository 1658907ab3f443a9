"""What is kept stays as long as nothing comes clearly more often; where something does, it gives way."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.train.step.most_used import USES_OF_A_PLACE, MostUsed


class Run:
    """Uses of keys: which found something kept, and which made it."""

    def __init__(self, most, occurrences=2, margin=8):
        self.used = MostUsed(most, occurrences, margin)
        self.made = 0

    def take(self, keys):
        """(share of the uses served by something kept, things made) of further uses."""
        served, made_before = 0, self.made
        for key in keys:
            found = self.used.use(key)
            assert found in (None, key)
            if found is None and self.used.make_room(key):
                self.used.keep(key, key)
                self.made += 1
                found = key
            served += found is not None
        return served / len(keys), self.made - made_before


def draw(weights, count, seed=0):
    return np.random.default_rng(seed).choice(len(weights), count, p=np.array(weights) / np.sum(weights)).tolist()


def test_of_keys_that_come_in_turns_the_first_are_kept():
    """Forgetting what was not used for longest would serve none of them, or make one at each use."""
    most, keys = 16, 100
    share, made = Run(most).take(list(range(keys)) * 50)
    assert made == most
    assert share == pytest.approx(most / keys, abs=2 / 50)


@pytest.mark.parametrize("keys", [80, 200, 500])
def test_of_many_keys_that_come_equally_often_few_are_made_and_their_share_is_served(keys):
    most, uses = 64, 20_000
    share, made = Run(most).take(draw([1] * keys, uses))
    assert share == pytest.approx(most / keys, rel=0.05)
    assert made - most < 0.01 * uses


def test_of_keys_that_come_differently_often_the_most_frequent_are_served():
    most, weights = 32, 1 / np.arange(1, 401)
    best = weights[:most].sum() / weights.sum()
    run = Run(most)
    run.take(draw(weights[::-1], 5_000))  # a poor start: the last keys are the frequent ones
    run.take(draw(weights, 10_000, seed=1))
    share, made = run.take(draw(weights, 10_000, seed=2))
    assert share > 0.97 * best
    assert made < 100


@pytest.mark.parametrize("keys", [30, 150])
def test_what_comes_no_more_gives_way(keys):
    most = 32
    run = Run(most)
    run.take(draw([1] * keys, 20_000))
    later = [("later", key) for key in draw([1] * keys, 20_000, seed=1)]
    patience = 8 * USES_OF_A_PLACE * most
    run.take(later[:patience])
    share, made = run.take(later[patience:])
    assert share == pytest.approx(min(1, most / keys), rel=0.1)
    assert made < 0.01 * len(later)


@given(
    st.lists(st.integers(0, 6), max_size=400),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_newcomer_takes_a_place_only_with_a_lead_over_the_least_used(keys, most, occurrences, margin):
    used = MostUsed(most, occurrences, margin)
    kept, counts = [], Counter()
    for number, key in enumerate(keys, start=1):
        counts[key] += 1
        if number % (USES_OF_A_PLACE * most) == 0:
            counts = Counter({other: count // 2 for other, count in counts.items()})
        assert used.use(key) == (f"of {key}" if key in kept else None)
        if key in kept:
            continue
        least = min(kept, key=lambda other: counts[other], default=None)
        full = len(kept) == most
        admitted = counts[key] >= occurrences and (not full or counts[key] - counts[least] >= margin)
        assert used.make_room(key) == admitted
        if admitted:
            used.keep(key, f"of {key}")
            if full:
                kept.remove(least)
            kept.append(key)


def test_uses_are_halved_and_not_forgotten():
    used = MostUsed(1, 1, USES_OF_A_PLACE)
    used.use("old")
    used.keep("old", "thing")
    admitted = []
    for _ in range(2 * USES_OF_A_PLACE):
        used.use("new")
        admitted.append(used.make_room("new"))
        if admitted[-1]:
            break
    before = USES_OF_A_PLACE - 1  # uses until the first halving, with which the count of the other is 0
    assert admitted[-1] and len(admitted) == before + USES_OF_A_PLACE - before // 2


def test_keys_that_do_not_come_again_are_not_remembered():
    used = MostUsed(4, 2, 8)
    for key in range(10_000):
        used.use(key)
        assert not used.make_room(key)
    assert len(used._counts) <= USES_OF_A_PLACE * 4
