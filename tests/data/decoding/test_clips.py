"""The choice of frames: golden lists worked out by hand from the rule, and the rule in exact fractions."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from opensora_fast.data.decoding.clips import choose_frames, is_image_path


class StartAt:
    """A generator that draws one given start and remembers the range it was asked for."""

    def __init__(self, start):
        self.start = start
        self.highest = None

    def integers(self, low, high, endpoint):
        assert low == 0 and endpoint
        self.highest = high
        return min(self.start, high)


# Begin + floor(i * (length - 1) / (frames - 1)) for i = 0 .. frames - 1, by hand.
GOLDEN = [
    # total, frames, interval, start, chosen
    (100, 4, 2, 0, (0, 2, 4, 7)),
    (100, 4, 1, 10, (10, 11, 12, 13)),
    (100, 16, 3, 0, (0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47)),
    (100, 16, 3, 51, (51, 54, 57, 60, 63, 66, 69, 72, 76, 79, 82, 85, 88, 91, 94, 98)),
    (49, 16, 3, 7, (0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47)),  # only start 0 is possible
    (20, 16, 3, 0, (0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 19)),  # shorter than the stretch: used whole
    (5, 5, 1, 0, (0, 1, 2, 3, 4)),
    (1, 1, 3, 0, (0,)),
    (10, 2, 3, 2, (2, 7)),
    (200, 8, 5, 160, (159, 164, 170, 175, 181, 186, 192, 198)),  # the highest start is 200 - 40 - 1
]


@pytest.mark.parametrize(("total", "frames", "interval", "start", "chosen"), GOLDEN)
def test_golden_lists(total, frames, interval, start, chosen):
    generator = StartAt(start)
    assert choose_frames(total, frames, interval, generator) == chosen
    assert generator.highest == max(0, total - frames * interval - 1)


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [2, 4, 8, 16, 24, 32, 48, 64, 96, 128])
def test_rule_in_exact_fractions(frames, interval):
    length = frames * interval
    for start in (0, 1, 17, 1000):
        step = Fraction(length - 1, frames - 1)
        exact = tuple(start + int(step * place) for place in range(frames))
        assert choose_frames(10**6, frames, interval, StartAt(start)) == exact


def test_rule_is_that_of_numpy_where_it_rounds():
    # 99 frames at interval 5 from 9: frame 49 is 256 exactly, and 255 in NumPy's linspace, which Open-Sora uses.
    chosen = choose_frames(10**6, 99, 5, StartAt(9))
    assert chosen == tuple(np.linspace(9, 9 + 99 * 5 - 1, 99, dtype=int))
    assert chosen[49] == 255


def test_every_start_occurs_and_no_other():
    rng = np.random.default_rng(0)
    starts = {choose_frames(30, 4, 5, rng)[0] for _ in range(400)}
    assert starts == set(range(30 - 20))


def test_same_generator_same_frames():
    first, second = (choose_frames(500, 16, 3, np.random.default_rng(5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 1), "3 frames, 4 are wanted"),
        ((10, 0, 1), "num_frames and frame_interval"),
        ((10, 4, 0), "num_frames and frame_interval"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_frames(*arguments, np.random.default_rng(0))


def test_images_are_known_by_their_ending():
    assert is_image_path("a/B.JPG") and is_image_path("x.webp") and is_image_path(Path("y.tiff"))
    assert not is_image_path("a.mp4") and not is_image_path("jpg") and not is_image_path("a.jpg.mp4")
