"""Latent videos to patches and back; what they hold is tested with the model's golden outputs."""

import pytest
import torch

from opensora_fast.kernels import patchify, unpatchify


def test_padded_videos_come_back_as_they_were():
    """Of one channel, a patch is the same in both orders."""
    batches = [torch.randn(2, 1, 3, 5, 7), torch.randn(1, 1, 1, 4, 1)]
    tokens = patchify(batches, 2)
    assert tokens.shape == (2 * 3 * 3 * 4 + 2 * 1, 4)
    again = unpatchify(tokens, [(2, 3, 5, 7), (1, 1, 4, 1)], 2, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, batches, strict=True))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "patchify: no batch; give at least one"),
        ([torch.zeros(4, 2, 5, 7)], r"a batch has shape \(4, 2, 5, 7\), expected \(any, any, any, any, any\)"),
        ([torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4)], r"\(1, 3, 2, 4, 4\), expected \(any, 4, any"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        patchify(batches, 2)


@pytest.mark.parametrize("shape", [(15, 32), (17, 32), (16, 30)])
def test_tokens_that_do_not_fit_are_refused(shape):
    """Those beyond the videos would otherwise be lost without a word."""
    with pytest.raises(ValueError, match=r"unpatchify: tokens has shape .*, expected \(16, 32\)"):
        unpatchify(torch.zeros(shape), [(1, 4, 4, 4)], 2, 8)
