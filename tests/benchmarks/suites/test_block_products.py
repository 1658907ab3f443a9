"""The products of a block are those of its Linears, each checked, and each library has a row of its own."""

from dataclasses import replace

import pytest
import torch

from opensora_fast.benchmarks.measuring.provider import Provider
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.providers import products
from opensora_fast.benchmarks.providers.products import BLOCK_PRODUCTS, DIRECTIONS, LIBRARY, OF_WEIGHT, OWN
from opensora_fast.benchmarks.suites import block_products
from opensora_fast.benchmarks.suites.scale import scale_of
from opensora_fast.costs.operations import linear_flops_per_token
from opensora_fast.kernels.linear import weight_gradient

SCALE = replace(scale_of("cpu"), seconds=0.01)


def measure(monkeypatch, makers):
    monkeypatch.setitem(BLOCK_PRODUCTS, "cpu", {"library": makers})
    (case,) = block_products.list_cases(SCALE)
    return case, case.measure(Session("cpu"), case.providers)


def test_a_row_counts_every_linear_of_a_block_forward_and_backward(monkeypatch):
    case, (rows, refused) = measure(monkeypatch, (LIBRARY, LIBRARY, OWN))
    (row,) = rows
    assert not refused and row.status == "ok" and row.error <= row.error_limit
    assert row.flops == 3 * row.tokens * linear_flops_per_token(SCALE.config) / SCALE.config.depth
    assert case.planned_rows().keys() == {row.key}
    assert row.provider_version == f"{LIBRARY.version()}, {OWN.version()}"


def test_the_whole_block_is_multiplied_each_time(monkeypatch):
    seen = []

    def prepare(product):
        multiply = LIBRARY.prepare(product)
        return lambda: (seen.append(product.output.shape), multiply())

    _, (rows, _) = measure(monkeypatch, 3 * (replace(LIBRARY, prepare=prepare),))
    width = SCALE.config.hidden_size
    weights = [shape for shape in seen if rows[0].tokens not in shape]
    sizes = 2 * [(3 * width, width)] + 4 * [(width, width)] + [(4 * width, width), (width, 4 * width)]
    assert weights[:8] == sizes
    assert len(seen) % (8 * len(DIRECTIONS) * SCALE.config.depth) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_wrong_product_costs_the_row(monkeypatch, direction):
    wrong = Provider("wrong", lambda product: lambda: product.output.copy_(1.01 * product.left @ product.right))
    makers = tuple(wrong if name == direction else LIBRARY for name in DIRECTIONS)
    _, (rows, refused) = measure(monkeypatch, makers)
    assert not rows and refused[0].error > refused[0].limit


def test_a_library_that_is_not_there_says_so(monkeypatch):
    absent = replace(LIBRARY, missing=lambda product: "" if product.direction == OF_WEIGHT else "is not installed")
    _, (rows, _) = measure(monkeypatch, (LIBRARY, absent, LIBRARY))
    assert [(row.status, row.reason) for row in rows] == [("unavailable", "is not installed")]


def test_ours_multiplies_as_its_model_does():
    for rows, columns in ((16, 48), (48, 16), (16, 16)):
        d_y, x = torch.randn(8, rows), torch.randn(8, columns)
        product = products.make_product(OF_WEIGHT, x, torch.randn(rows, columns), d_y)
        OWN.prepare(product)()
        torch.testing.assert_close(product.output, weight_gradient(d_y, x), rtol=0, atol=0)
