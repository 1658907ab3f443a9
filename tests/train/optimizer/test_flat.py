"""A flat tensor and its shards hold the named tensors, whatever their sizes and the number of shards."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.train.optimizer.flat import ALIGNMENT, FlatLayout

SHAPES = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=1, max_size=6)
CPU = torch.device("cpu")


def number(shapes):
    """Named tensors with elements 1, 2, 3, ..."""
    tensors, first = {}, 1
    for place, shape in enumerate(shapes):
        tensor = torch.empty(shape)
        tensors[str(place)] = torch.arange(first, first + tensor.numel(), dtype=torch.float32).view(shape)
        first += tensor.numel()
    return tensors


@settings(max_examples=200)
@given(SHAPES, st.integers(1, 5))
def test_shards_joined_are_the_flat_tensor(shapes, shards):
    tensors = number(shapes)
    layout = FlatLayout({name: tensor.shape for name, tensor in tensors.items()}, shards)
    assert layout.size % (shards * ALIGNMENT) == 0
    flat = layout.gather(tensors, torch.float32, CPU)
    assert flat.shape == (layout.size,)
    for name, view in layout.views(flat).items():
        assert torch.equal(view, tensors[name]) and view.storage_offset() % ALIGNMENT == 0
    assert torch.equal(flat[flat != 0], torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
    length = layout.size // shards
    pieces = [torch.zeros(length) for _ in range(shards)]
    for place, piece in enumerate(pieces):
        layout.fill(piece, tensors, place * length)
    assert torch.equal(torch.cat(pieces), flat)


def test_one_shard_adds_nothing():
    shapes = {"a": torch.Size([3, 50]), "b": torch.Size([64])}
    assert FlatLayout(shapes).size == 192 + 64
