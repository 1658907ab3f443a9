"""Attention within many sequences: split where PyTorch's kernels need it, with the numbers of one call."""

import pytest
import torch

from opensora_fast.kernels import PackLayout, sequence_attention, spatial_attention, temporal_attention
from opensora_fast.kernels.sequence_attention import attend_sequences

ATTENTION = "torch.nn.functional.scaled_dot_product_attention"


def record_calls(monkeypatch, attend):
    """Shapes of q in the calls of PyTorch's attention, which `attend` answers."""
    shapes = []
    monkeypatch.setattr(ATTENTION, lambda q, k, v: shapes.append(tuple(q.shape)) or attend(q, k, v))
    return shapes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((49152, 16, 1, 72), [10922] * 4 + [5464]),  # the first two took an H200 down in one call
        ((12288, 16, 4, 72), [10922, 1366]),
        ((3072, 16, 16, 72), [3072]),
        ((12, 16, 4096, 72), [12]),
        ((8192, 16, 128, 128), [8192]),  # 2^31 elements, which can be counted
        ((8193, 16, 128, 128), [8192, 1]),
        ((70000, 1, 2, 8), [65535, 4465]),
    ],
)
def test_no_call_is_larger_than_its_kernels_can_count(monkeypatch, shape, expected):
    calls = record_calls(monkeypatch, lambda q, k, v: q[:, 0, 0, 0])
    numbers = torch.arange(shape[0])
    q = numbers[:, None, None, None].expand(shape)
    assert torch.equal(attend_sequences(q, q, q), numbers)
    assert [call[0] for call in calls] == expected and all(call[1:] == shape[1:] for call in calls)


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_a_split_call_gives_the_numbers_of_one(monkeypatch, kind):
    calls = record_calls(monkeypatch, torch.nn.functional.scaled_dot_product_attention)
    torch.manual_seed(0)
    layout = PackLayout.of([(2, 3, 4), (4, 2, 2)], "cpu")
    leaves = [torch.randn(layout.num_tokens, 3, 2, 8), 1 + 0.1 * torch.randn(8), 1 + 0.1 * torch.randn(8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    seed = torch.randn(layout.num_tokens, 2, 8)
    angles = torch.randn(4, 4)

    def compute():
        if kind == "temporal":
            output = temporal_attention(*leaves, angles.cos(), angles.sin(), layout, backend="reference")
        else:
            output = spatial_attention(*leaves, layout, backend="reference")
        return [output, *torch.autograd.grad((output * seed).sum(), leaves)]

    whole = compute()
    assert len(calls) == 2
    calls.clear()
    monkeypatch.setattr(sequence_attention, "MOST_SEQUENCES", 3)
    split = compute()
    assert [call[0] for call in calls] == ([3, 3, 3, 3, 3, 1] if kind == "temporal" else [2, 3, 1])
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
