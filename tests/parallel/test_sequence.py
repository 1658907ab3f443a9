"""Processes that compute a pack together: each frame belongs to one of them, and together they are one."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing_processes import compute, make_model, run_together

from opensora_fast.costs.operations import VideoBatch, largest_share
from opensora_fast.kernels import PackLayout
from opensora_fast.parallel.join import count_replicas
from opensora_fast.parallel.sequence import FrameRange, SequenceGroup, divide_frames

SHAPES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=6).map(tuple)
WORLD = 4


def frames_of(share):
    return [(part.video, frame) for part in share for frame in range(part.first, part.last)]


@given(SHAPES, st.integers(1, 9))
def test_every_frame_belongs_to_one_process_in_the_order_of_the_pack(shapes, processes):
    shares = divide_frames(shapes, processes)
    assert len(shares) == processes
    all_frames = [(video, frame) for video, (frames, _, _) in enumerate(shapes) for frame in range(frames)]
    assert sum(map(frames_of, shares), []) == all_frames
    for share in shares:
        assert [part.video for part in share] == sorted({part.video for part in share})


@given(SHAPES, st.integers(1, 9))
def test_no_process_has_more_than_its_part_and_one_frame(shapes, processes):
    tokens = [
        sum((part.last - part.first) * shapes[part.video][1] * shapes[part.video][2] for part in share)
        for share in divide_frames(shapes, processes)
    ]
    total = sum(frames * height * width for frames, height, width in shapes)
    assert max(tokens) <= total / processes + max(height * width for _, height, width in shapes)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_the_counted_largest_share_is_that_of_the_frames(batch, frames, frame_tokens, processes):
    shares = divide_frames(((frames, 1, frame_tokens),) * batch, processes)
    largest = largest_share(VideoBatch(batch, frames, frame_tokens), processes)
    assert largest.tokens == max(len(frames_of(share)) for share in shares) * frame_tokens
    assert max(map(len, shares)) <= largest.batch <= batch


def group_of(size, rank=0):
    group = SequenceGroup.__new__(SequenceGroup)
    group.size, group.rank = size, rank
    return group


def test_a_process_without_a_frame_computes_the_last_one_in_vain():
    layout = PackLayout.of([(1, 2, 3), (1, 1, 4)], "cpu")
    shares = [group_of(4, rank).divide(layout) for rank in range(4)]
    assert sorted(share.vain for share in shares) == [0, 0, 4, 4]
    for share in shares:
        assert share.tokens == shares[0].tokens and sum(share.tokens) == 10
        assert share.vain == 0 or (share.frames == (FrameRange(1, 0, 1),) and share.owned == 0)


def test_what_cannot_be_shared_out_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="3 processes cannot .*: the 4 heads .* divisor of 4"):
        model.share_frames(SimpleNamespace(size=3))
    assert count_replicas(8, 4) == 2
    with pytest.raises(ValueError, match="sp_size=4: 6 processes do not form groups of 4"):
        count_replicas(6, 4)
    with pytest.raises(ValueError, match="sp_size=2: 1 process does not form .* torchrun"):
        count_replicas(1, 2)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Results of real processes by (size of the group, rank)."""
    folder = tmp_path_factory.mktemp("together")
    process = multiprocessing.get_context("spawn").Process(target=run_together, args=(WORLD, str(folder)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return {(size, rank): torch.load(folder / f"{size}-{rank}.pt") for size in (2, WORLD) for rank in range(WORLD)}


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return compute(make_model())


@pytest.mark.parametrize("size", [2, WORLD])
def test_outputs_and_summed_gradients_are_those_of_one_process(together, alone, size):
    for first in range(0, WORLD, size):
        group = [together[size, rank] for rank in range(first, first + size)]
        assert all(results.keys() == alone.keys() for results in group)
        for name, (output, gradient) in alone.items():
            # The output is rounded to float32.
            for results in group:
                torch.testing.assert_close(results[name][0], output, rtol=1e-6, atol=1e-6, msg=name)
            summed = sum(results[name][1] for results in group)
            assert (summed - gradient).norm() <= 1e-6 * gradient.norm(), name
            assert any((results[name][1] - gradient).norm() > 1e-3 * gradient.norm() for results in group), name


@pytest.mark.parametrize("size", [2, WORLD])
def test_all_processes_of_a_group_have_the_same_output_to_the_bit(together, size):
    for rank in range(WORLD):
        for name, (output, _) in together[size, rank].items():
            assert torch.equal(output, together[size, rank // size * size][name][0]), name


@settings(max_examples=30)  # a layout of new shapes takes its time
@given(SHAPES, st.integers(1, 5), st.data())
def test_a_share_keeps_which_frames_are_given(shapes, processes, data):
    layout = PackLayout.of(shapes, "cpu")
    masks = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=t, max_size=t))) for t, _, _ in shapes]
    rows = layout.modulation_rows(masks)
    for rank in range(processes):
        share = group_of(processes, rank).divide(layout)
        own = PackLayout.of([(part.last - part.first, *shapes[part.video][1:]) for part in share.frames], "cpu")
        expected = own.modulation_rows([masks[part.video][part.first : part.last] for part in share.frames])
        taken = share.take_frame_rows(rows)
        assert taken.dtype == torch.int32 and torch.equal(taken, expected)
