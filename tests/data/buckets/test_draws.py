"""First draws of many generators: bit-equal to NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.data.buckets.draws import BLOCK_ROWS, draw_first_uniform


def draw_one_by_one(seeds: np.ndarray) -> np.ndarray:
    return np.array([np.random.default_rng(int(seed)).random() for seed in seeds])


def test_small_seeds_and_both_sides_of_the_word_boundary():
    seeds = np.concatenate([np.arange(500), 2**32 + np.arange(-250, 250)]).astype(np.uint64)
    np.testing.assert_array_equal(draw_first_uniform(seeds), draw_one_by_one(seeds))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40))
def test_any_seed(seeds):
    seeds = np.array(seeds, np.uint64)
    np.testing.assert_array_equal(draw_first_uniform(seeds), draw_one_by_one(seeds))


def test_more_rows_than_a_block():
    seeds = np.arange(2 * BLOCK_ROWS + 3, dtype=np.uint64) * np.uint64(848)
    some = np.array([0, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 2])
    np.testing.assert_array_equal(draw_first_uniform(seeds)[some], draw_one_by_one(seeds[some]))


def test_strided_seeds_and_no_seeds():
    seeds = np.arange(20, dtype=np.uint64)[::3]
    np.testing.assert_array_equal(draw_first_uniform(seeds), draw_one_by_one(seeds))
    assert draw_first_uniform(np.empty(0, np.uint64)).shape == (0,)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="uint64"):
        draw_first_uniform(np.arange(3))
