"""Rows of modulation tables for tokens: what each token gets, and how exact the gradient of a table is."""

import pytest
import torch

from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.token_rows import token_rows

SHAPES = {"uniform": [(4, 3, 5)] * 2, "mixed": [(2, 3, 5), (2, 3, 5), (1, 4, 4), (3, 2, 2)]}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_each_token_has_the_row_of_its_frame(shapes, given):
    layout = PackLayout.of(SHAPES[shapes], "cpu")
    rows = layout.frame_video
    if given:  # every second frame has the row of given frames, behind those of noised ones
        rows = rows + layout.num_videos * (torch.arange(len(rows)) % 2)
    table = torch.randn(layout.num_videos * (2 if given else 1), 7, dtype=torch.float64, requires_grad=True)
    spread = token_rows(table, rows, layout)
    gathered = table[rows[layout.token_frame]]
    assert torch.equal(spread, gathered)
    weights = torch.randn_like(spread)
    found, expected = (torch.autograd.grad(z, table, weights)[0] for z in (spread, gathered))
    torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_table_is_a_sum_in_float32():
    """It errs as one rounding to bfloat16 for each frame does, however many tokens share the row."""
    layout = PackLayout.of([(4, 40, 50)], "cpu")
    torch.manual_seed(0)
    table = torch.randn(1, 32).bfloat16().requires_grad_()
    spread = token_rows(table, layout.frame_video, layout)
    weights = torch.randn(spread.shape).bfloat16()
    (found,) = torch.autograd.grad(spread, table, weights)
    exact = weights.double().sum(0, keepdim=True)
    assert (found.double() - exact).norm() <= 2 * torch.finfo(torch.bfloat16).eps * exact.norm()
