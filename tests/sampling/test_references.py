"""Mask strategies: what they say, and where reference frames go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.sampling import Placement, parse_mask_strategy, place_references
from opensora_fast.sampling.references import check_placements


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, []),
        ("", []),
        ("0", [(0, 0, 0, 0, 1, 0.0)]),
        ("1,2", [(1, 2, 0, 0, 1, 0.0)]),
        ("0,0,-8,0,8", [(0, 0, -8, 0, 8, 0.0)]),
        ("0,0,0,0,16,0.4", [(0, 0, 0, 0, 16, 0.4)]),
        ("0;0,1,0,-1,1", [(0, 0, 0, 0, 1, 0.0), (0, 1, 0, -1, 1, 0.0)]),
        (" 0 , 1 ; 2 ", [(0, 1, 0, 0, 1, 0.0), (2, 0, 0, 0, 1, 0.0)]),
    ],
)
def test_numbers_left_out_have_their_defaults(text, expected):
    assert parse_mask_strategy(text) == tuple(Placement(*numbers) for numbers in expected)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a", "loop must be a whole number, got 'a'"),
        ("0,0,0.5", "reference_start must be a whole number"),
        ("0,0,0,0,1,x", "edit_ratio must be a number from 0 to 1, got 'x'"),
        ("0,0,0,0,1,1.5", "edit_ratio must be a number from 0 to 1, got 1.5"),
        ("0,0,0,0,1,nan", "edit_ratio"),
        ("0,0,0,0,0", "length must be at least 1, got 0"),
        ("-1", "loop must be at least 0"),
        ("0,-1", "reference must be at least 0"),
        ("0,0,0,0,1,0,7", "has 7 numbers, at most 6"),
        ("0;", "a tuple is empty"),
        ("0,,1", "reference must be a whole number, got ''"),
    ],
)
def test_a_malformed_strategy_names_the_tuple_and_the_number(text, named):
    with pytest.raises(ValueError, match=named):
        parse_mask_strategy(text)


def place(strategy, references, frames=8, loop=0):
    """Latents of -1, with reference r's frame f holding 100 r + f; returns the frames' values and the mask."""
    latents = torch.full((4, frames, 2, 3), -1.0)
    tensors = [
        (100.0 * number + torch.arange(length)).view(1, -1, 1, 1).expand(4, -1, 2, 3)
        for number, length in enumerate(references)
    ]
    mask = place_references(latents, tensors, parse_mask_strategy(strategy), loop)
    assert (latents == latents[:1, :, :1, :1]).all()
    return latents[0, :, 0, 0].tolist(), [round(value, 6) for value in mask.tolist()]


@pytest.mark.parametrize(
    ("mode", "strategy", "references", "values", "mask"),
    [
        ("text to video", None, [], [-1] * 8, [1] * 8),
        ("animate an image", "0", [1], [0] + [-1] * 7, [0] + [1] * 7),
        ("extend a video", "0,0,-3,0,3", [20], [17, 18, 19] + [-1] * 5, [0] * 3 + [1] * 5),
        ("extend backwards", "0,0,0,-3,3", [20], [-1] * 5 + [0, 1, 2], [1] * 5 + [0] * 3),
        ("connect two", "0;0,1,0,-1,1", [1, 1], [0] + [-1] * 6 + [100], [0] + [1] * 6 + [0]),
        ("edit a video", "0,0,2,0,8,0.4", [12], [2, 3, 4, 5, 6, 7, 8, 9], [0.4] * 8),
        ("an image is repeated", "0,0,0,0,3", [1], [0, 0, 0] + [-1] * 5, [0] * 3 + [1] * 5),
        ("later tuples win", "0,0,0,0,3,0.5;0,1,0,2,1", [9, 9], [0, 1, 100] + [-1] * 5, [0.5, 0.5, 0] + [1] * 5),
    ],
)
def test_the_modes(mode, strategy, references, values, mask):
    assert place(strategy, references) == (values, mask), mode


def test_placements_of_other_loops_are_passed_over():
    assert place("0;1,0,5", [9], loop=1) == ([5] + [-1] * 7, [0] + [1] * 7)
    assert place("0", [9], loop=1) == ([-1] * 8, [1] * 8)


@given(
    frames=st.integers(1, 12), reference=st.integers(2, 12), source=st.integers(-12, 11), target=st.integers(-12, 11),
    length=st.integers(1, 12), edit=st.floats(0, 1),
)  # fmt: skip
def test_frames_go_where_the_numbers_say_or_are_refused(frames, reference, source, target, length, edit):
    first = source if source >= 0 else reference + source
    to = target if target >= 0 else frames + target
    strategy = f"0,0,{source},{target},{length},{edit}"
    fits = 0 <= first and first + length <= reference and 0 <= to and to + length <= frames
    if not fits:
        with pytest.raises(ValueError, match="mask_strategy tuple"):
            place(strategy, [reference], frames)
        return
    values, mask = place(strategy, [reference], frames)
    for frame in range(frames):
        placed = to <= frame < to + length
        assert values[frame] == (first + frame - to if placed else -1)
        assert mask[frame] == pytest.approx(edit if placed else 1, abs=1e-6)


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        ("0,0,5,0,8", "frames 5 to 12 are asked of reference 0, which has 10"),
        ("0,0,10", "reference_start 10 lies outside reference 0, which has 10 frames; use -10 to 9"),
        ("0,0,0,8", "target_start 8 lies outside the sample, which has 8 frames; use -8 to 7"),
        ("0,0,0,-2,3", "frames 6 to 8 do not fit into the sample of 8 frames"),
    ],
)
def test_frames_that_do_not_exist_are_named(strategy, named):
    with pytest.raises(ValueError, match=named):
        place(strategy, [10])


def test_loops_references_and_frames_that_do_not_exist_are_named_before_references_are_read():
    def check(strategy, references=1, loops=1):
        check_placements(parse_mask_strategy(strategy), references, loops, frames=8)

    check("1,1,0,-8,8", references=2, loops=2)
    with pytest.raises(ValueError, match="loop 2 does not come, the loops are 0 to 1"):
        check("2", loops=2)
    with pytest.raises(ValueError, match="there is no reference 1, references: 0 to 0"):
        check("0,1")
    with pytest.raises(ValueError, match="give reference_path"):
        check("0", references=0)
    with pytest.raises(ValueError, match="target_start 8 lies outside the sample, which has 8 frames"):
        check("0,0,0,8")
    with pytest.raises(ValueError, match="frames 1 to 8 do not fit into the sample of 8 frames"):
        check("0,0,0,1,8")
