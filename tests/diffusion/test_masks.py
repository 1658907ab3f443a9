"""Frame masks: nine kinds, their shapes and how often they come."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.config.sections import MASK_NAMES
from opensora_fast.diffusion import MaskGenerator

STAGE_RATIOS = {
    "mask_no": 0.75,
    "mask_quarter_random": 0.025,
    "mask_quarter_head": 0.025,
    "mask_quarter_tail": 0.025,
    "mask_quarter_head_tail": 0.05,
    "mask_image_random": 0.025,
    "mask_image_head": 0.025,
    "mask_image_tail": 0.025,
    "mask_image_head_tail": 0.05,
}


def given_runs(mask):
    """(start, end) of the runs of given frames."""
    given = [False, *(~mask).tolist(), False]
    edges = [index for index in range(len(given) - 1) if given[index] != given[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


@given(kind=st.sampled_from(MASK_NAMES), frames=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_each_kind_gives_the_frames_it_names(kind, frames, seed):
    mask = MaskGenerator({kind: 1.0}).draw(frames, torch.Generator().manual_seed(seed))
    assert mask.shape == (frames,) and mask.dtype == torch.bool
    if frames == 1 or kind == "mask_no":
        assert mask.all()
        return
    longest = 1 if "image" in kind else max(1, frames // 4)
    count = (~mask).sum().item()
    if kind.endswith("head_tail"):
        assert torch.equal(mask, mask.flip(0)) and not mask[0]
        assert 2 <= count <= 2 * longest and len(given_runs(mask)) == (1 if frames == 2 else 2)
    else:
        [(start, end)] = given_runs(mask)
        assert 1 <= end - start <= longest
        assert start == 0 if kind.endswith("head") else True
        assert end == frames if kind.endswith("tail") else True


@pytest.mark.parametrize("kind", [kind for kind in MASK_NAMES if "quarter" in kind])
@pytest.mark.parametrize("frames", [2, 3])
def test_quarter_kinds_give_one_frame_of_short_clips(kind, frames):
    for seed in range(20):
        mask = MaskGenerator({kind: 1.0}).draw(frames, torch.Generator().manual_seed(seed))
        assert (~mask).sum() == (2 if kind.endswith("head_tail") else 1)


def test_kinds_come_as_often_as_their_ratios_say():
    generator = torch.Generator().manual_seed(0)
    masks = MaskGenerator(STAGE_RATIOS).get_masks(torch.empty(20_000, 4, 16, 1, 1), generator)
    is_head, is_tail = ~masks[:, 0], ~masks[:, -1]
    given_count = (~masks).sum(1)

    def share(condition):
        return condition.float().mean().item()

    assert share(masks.all(1)) == pytest.approx(0.75, abs=0.01)
    assert share(is_head & is_tail) == pytest.approx(0.10, abs=0.008)
    # image_head, the quarter of quarter_head that is one frame long, and the random ones that fall on the first frame
    expected = 0.025 + 0.025 / 4 + 0.025 / 16 + 0.025 / 4 / 16
    assert share(is_head & ~is_tail & (given_count == 1)) == pytest.approx(expected, abs=0.004)


def test_quarter_lengths_and_random_places_are_uniform():
    generator = torch.Generator().manual_seed(1)
    masks = MaskGenerator({"mask_quarter_random": 1.0}).get_masks(torch.empty(20_000, 4, 8, 1, 1), generator)
    lengths = (~masks).sum(1)
    starts = (~masks).int().argmax(1)
    assert set(lengths.tolist()) == {1, 2}
    assert (lengths == 1).float().mean().item() == pytest.approx(0.5, abs=0.015)
    for length, places in ((1, 8), (2, 7)):
        counts = torch.bincount(starts[lengths == length], minlength=places) / (lengths == length).sum()
        assert len(counts) == places
        torch.testing.assert_close(counts, torch.full((places,), 1 / places), atol=0.015, rtol=0)


def test_masks_come_from_the_generator():
    generator = MaskGenerator(STAGE_RATIOS)
    x = torch.empty(64, 4, 16, 2, 2)
    first, again = (generator.get_masks(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (64, 16) and torch.equal(first, again)
    assert not torch.equal(first, generator.get_masks(x, torch.Generator().manual_seed(6)))
    torch.manual_seed(5)
    assert torch.equal(generator.get_masks(x), first)
    assert generator.get_mask(x).shape == (16,)


@pytest.mark.parametrize(
    ("ratios", "named"),
    [
        ({"mask_none": 1.0}, "mask_none"),
        ({"mask_no": 1.5, "mask_image_head": -0.5}, "mask_ratios: mask_no is 1.5; a ratio is a number from 0 to 1"),
        ({"mask_no": float("nan")}, "mask_no"),
        ({"mask_no": "1"}, "mask_no"),
        ({"mask_no": True}, "mask_no"),
        ({"mask_no": 0.7, "mask_image_head": 0.2}, "sum to 0.9; they must sum to 1"),
        ({}, "sum to 0; they must sum to 1"),
    ],
)
def test_broken_ratios_are_named(ratios, named):
    with pytest.raises(ValueError, match=named):
        MaskGenerator(ratios)
