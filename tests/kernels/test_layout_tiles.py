"""Tile tables of the pack layout."""

import re
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import PackLayout, TextLayout
from opensora_fast.kernels.attention.tables import keep_tables, row_tiles, tile_ranges
from opensora_fast.kernels.layout import FRAME_TILE_SIZES, Run

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=4)


@given(SHAPES, st.sampled_from(FRAME_TILE_SIZES))
@settings(max_examples=60)
def test_tiles_cover_every_token_once_and_stay_inside_a_frame(shapes: list[tuple[int, int, int]], size: int) -> None:
    layout = PackLayout.of(shapes, "cpu")
    tiles = layout.frame_tiles(size)
    first, count, frame = tiles.long().unbind(1)
    assert tiles.dtype == torch.int32 and count.min() >= 1 and count.max() <= size
    tokens = torch.cat([torch.arange(start, start + length) for start, length, _ in tiles.tolist()])
    assert torch.equal(tokens, torch.arange(layout.num_tokens))
    assert torch.equal(torch.repeat_interleave(frame, count), layout.token_frame.long())
    least = sum(frames * -(-height * width // size) for frames, height, width in shapes)
    assert len(tiles) == least, "more tiles than cutting at full size would give"


@given(SHAPES)
@settings(max_examples=20)
def test_video_tiles_name_the_first_tile_of_each_video(shapes: list[tuple[int, int, int]]) -> None:
    layout = PackLayout.of(shapes, "cpu")
    tiles, starts = layout.frame_tiles(16), layout.video_tiles(16)
    assert starts[0] == 0 and starts[-1] == len(tiles)
    videos = layout.frame_video[tiles[:, 2].long()]
    assert torch.equal(torch.repeat_interleave(torch.arange(len(shapes)), starts.diff().long()), videos.long())


def test_tiles_of_a_frame_are_equally_long() -> None:
    counts = PackLayout.of([(2, 15, 27)], "cpu").frame_tiles(128)[:, 1].tolist()  # 405 tokens a frame
    assert counts == [102, 102, 102, 99] * 2


def test_runs_join_consecutive_videos_of_one_shape() -> None:
    runs = PackLayout.of([(2, 3, 4), (2, 3, 4), (2, 3, 4), (2, 4, 3), (2, 3, 4)], "cpu").runs
    assert runs == (Run(0, 0, 0, 3, 2, 3, 4), Run(3, 6, 72, 1, 2, 4, 3), Run(4, 8, 96, 1, 2, 3, 4))
    assert [run.tokens for run in runs] == [72, 24, 24]


@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0]])
def test_lengths_and_masks_describe_the_same_texts(lengths) -> None:
    device, longest = torch.device("cpu"), max(*lengths, 1)
    by_lengths = TextLayout.from_lengths(lengths, device)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    by_mask, index = TextLayout.from_mask(mask, len(lengths), longest, device)
    assert by_lengths.starts.tolist() == by_mask.starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    assert by_lengths.lengths.tolist() == by_mask.lengths.tolist() == lengths
    assert by_lengths.max_length == by_mask.max_length == longest
    assert by_lengths.num_tokens == by_mask.num_tokens == len(index) == sum(lengths)


def test_an_unknown_tile_size_is_named() -> None:
    with pytest.raises(ValueError, match="size 20 is not one of"):
        PackLayout.of([(1, 2, 2)], "cpu").frame_tiles(20)


@pytest.mark.parametrize(
    "shapes", [[(2**16, 2**15, 1)], [(1, 2**16, 2**14), (2, 2**14, 2**15)], [(2**32, 2**16, 2**16)]]
)
def test_more_tokens_than_tables_can_count_are_refused(shapes) -> None:
    with pytest.raises(ValueError, match=r"PackLayout: \d+ tokens; a pack holds fewer than 2\*\*31"):
        PackLayout.of(shapes, "cpu")


@pytest.mark.parametrize("shapes", [[(2, 3.5, 4)], [(2, 3.0, 4)], [2, 3, 4], [("2", 3, 4)], [(None, 3, 4)]])
def test_shapes_that_are_not_whole_numbers_are_named(shapes) -> None:
    with pytest.raises(ValueError, match="give whole numbers"):
        PackLayout.of(shapes, "cpu")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, -3, -4), (2, 3), (1, 2, 3, 4), ()])
def test_shapes_that_no_video_has_are_named(shape) -> None:
    with pytest.raises(ValueError, match=re.escape(f"PackLayout: video 1 has shape {shape}; expected (T, H, W)")):
        PackLayout.of([(1, 1, 1), shape], "cpu")


def test_a_pack_without_videos_is_named() -> None:
    with pytest.raises(ValueError, match="PackLayout: no videos; give at least one"):
        PackLayout.of([], "cpu")


def test_given_frames_have_the_second_half_of_the_modulation_rows() -> None:
    layout = PackLayout.of([(3, 1, 2), (2, 4, 1)], "cpu")
    assert layout.modulation_rows([torch.tensor([True, False, True]), None]).tolist() == [0, 2, 0, 1, 1]
    assert layout.modulation_rows([None, None]) is layout.modulation_rows(None) is layout.frame_video
    batch = PackLayout.of([(2, 4, 1), (2, 4, 1)], "cpu")
    assert batch.modulation_rows(torch.tensor([[True, False], [False, True]])).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([None], "1 masks for 2 videos"),
        ([None, torch.ones(3)], r"x_masks\[1\]: shape \(3,\), but the video has 2 frames"),
        (torch.ones(2, 2), r"shape \(2, 2\) does not fit 2 videos of \[3, 2\] frames"),
        (torch.ones(2, 3), r"shape \(2, 3\) does not fit 2 videos of \[3, 2\] frames"),
    ],
)
def test_masks_that_do_not_fit_the_frames_are_named(masks, message) -> None:
    with pytest.raises(ValueError, match=message):
        PackLayout.of([(3, 1, 2), (2, 4, 1)], "cpu").modulation_rows(masks)


def test_lengths_of_texts_that_are_not_whole_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="TextLayout: lengths .*2.5.*; give a whole number for each video"):
        TextLayout.from_lengths([3, 2.5], torch.device("cpu"))


def test_whole_numbers_of_any_type_make_a_layout() -> None:
    given = PackLayout.of([torch.tensor([2, 3, 4]), np.array([1, 5, 6])], "cpu")
    assert given is PackLayout.of([(2, 3, 4), (1, 5, 6)], "cpu")
    assert TextLayout.from_lengths(torch.tensor([3, 2]), torch.device("cpu")).num_tokens == 5


def test_a_layout_first_made_in_inference_mode_serves_training_later() -> None:
    with torch.inference_mode():
        layout = PackLayout.of([(3, 1, 41), (2, 5, 7)], "cpu")  # shapes of this test alone: layouts are cached
    weight = torch.ones(layout.num_videos, 1, requires_grad=True)
    weight[layout.frame_video].sum().backward()  # saves the index
    assert weight.grad.flatten().tolist() == [3.0, 2.0]
    tables = [layout.frame_position, layout.token_frame, *layout.place_tiles(64)]
    tables += [table for size in FRAME_TILE_SIZES for table in (layout.frame_tiles(size), layout.video_tiles(size))]
    assert not any(table.is_inference() for table in tables)


def test_another_default_device_changes_nothing() -> None:
    """`with torch.device(...)` around a model's construction or call, as is usual, is about the tensors of the user."""
    with torch.device("meta"):
        layout = PackLayout.of([(3, 5, 7), (130, 1, 3)], "cpu")
        tables = [layout.token_frame, *layout.frame_tiles(FRAME_TILE_SIZES[0]), *layout.place_tiles(64)]
        tables += [row_tiles((3, 35, 130, 3), 16, layout.device), tile_ranges((3, 35, 130, 3), 16, layout.device)]
        text = TextLayout.from_lengths([4, 2], layout.device)
    assert {table.device.type for table in (*tables, text.starts, text.lengths)} == {"cpu"}


def test_tables_that_are_asked_for_are_kept_by_whoever_wants_them(device):
    runs = (2, 37, 1, 90)
    row_tiles(runs, 16, device)
    with keep_tables() as kept:
        with keep_tables() as others:
            thread = Thread(target=row_tiles, args=(runs, 16, device))  # backward runs in another thread
            thread.start()
            thread.join()
        ranges = tile_ranges(runs, 32, device)
    row_tiles(runs, 64, device)
    tiles = row_tiles(runs, 16, device)
    assert [id(table) for table in kept] == [id(tiles), id(ranges)]
    assert [id(table) for table in others] == [id(tiles)]


def test_a_layout_made_in_a_transform_of_torch_func_is_not_kept() -> None:
    shapes = [(2, 3, 7), (1, 9, 11)]
    torch.func.grad(lambda x: x.sum() + PackLayout.of(shapes, "cpu").num_tokens)(torch.ones(2))
    layout = PackLayout.of(shapes, "cpu")
    assert layout.token_frame.data_ptr(), "a wrapper that the transform has left has no data"
    assert layout is PackLayout.of(shapes, "cpu")
