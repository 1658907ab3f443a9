"""The matrix products of a Linear, and the MLP, by every library: what each computes."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from quack_stand_in import QuackStandIn, install
from torch.nn.functional import gelu, linear

from opensora_fast.benchmarks.measuring.contest import op_results
from opensora_fast.benchmarks.measuring.provider import Provider, of_function
from opensora_fast.benchmarks.providers import mlp
from opensora_fast.benchmarks.providers.blocks import BLOCK_PROVIDERS
from opensora_fast.benchmarks.providers.products import (
    DIRECTIONS,
    OF_WEIGHT,
    PRODUCT_PROVIDERS,
    make_product,
    quack_version,
    split_over_tokens,
    transpose_product,
)
from opensora_fast.benchmarks.suites import ceilings

TOKENS, WIDTH_IN, WIDTH_OUT = 24, 5, 7


def operands(dtype=torch.float32, tokens=TOKENS):
    torch.manual_seed(0)
    return [torch.randn(*shape).to(dtype) for shape in ((tokens, WIDTH_IN), (WIDTH_OUT, WIDTH_IN), (tokens, WIDTH_OUT))]


def gradients_of_a_linear(x, weight, gradient):
    """By autograd, in float64."""
    x, weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    output = linear(x, weight)
    return dict(zip(DIRECTIONS, (output, *torch.autograd.grad(output, (x, weight), gradient.double())), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_three_products_are_a_linear_and_its_gradients(direction):
    product = make_product(direction, *operands())
    expected = gradients_of_a_linear(*operands())[direction]
    (library,) = PRODUCT_PROVIDERS["cpu"]
    torch.testing.assert_close(library.prepare(product)().double(), expected, rtol=1e-5, atol=1e-5)
    assert product.output.double().allclose(expected, atol=1e-5)  # where the check looks


def test_the_result_of_another_provider_is_no_excuse():
    """All of a race write to one tensor; who leaves it alone, or writes elsewhere, must not pass."""
    product = make_product(DIRECTIONS[0], *operands())
    (library,) = PRODUCT_PROVIDERS["cpu"]
    elsewhere = Provider("elsewhere", lambda product: partial(torch.mm, product.left, product.right))
    passed = []
    for provider in (library, elsewhere):
        call, check = ceilings._prepare_product(provider, product)
        call()
        passed.append(check().error <= check().limit)
    assert passed == [True, False]


@pytest.mark.parametrize("left_out", [slice(64, None), slice(1, None), slice(100, 101), slice(-1, None)])
@pytest.mark.parametrize("left_over", [float("nan"), 0.0], ids=["unwritten", "zeros"])
def test_a_product_that_leaves_out_rows_is_wrong(left_out, left_over):
    product = make_product(DIRECTIONS[0], *operands(tokens=512))

    def prepare(product):
        def call():
            kept = product.output[left_out].clone().fill_(left_over)
            torch.mm(product.left, product.right, out=product.output)
            product.output[left_out] = kept

        return call

    call, check = ceilings._prepare_product(Provider("partial", prepare), product)
    call()
    one_row_between = left_out == slice(100, 101) and left_over == 0.0  # not looked at, and there
    assert (check().error <= check().limit) is one_row_between


@pytest.mark.parametrize("prepare", [split_over_tokens, transpose_product])
def test_in_parts_of_the_tokens_or_transposed_the_gradient_of_a_weight_is_the_same(prepare):
    product = make_product(OF_WEIGHT, *operands())
    prepare(product)()
    expected = gradients_of_a_linear(*operands())[OF_WEIGHT]
    torch.testing.assert_close(product.output.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_over_a_part_of_the_tokens_are_for_the_gradient_of_a_weight():
    split = next(provider for provider in PRODUCT_PROVIDERS["cuda"] if provider.name == "cublas-split")
    assert [split.missing(make_product(direction, *operands())) for direction in DIRECTIONS] == [
        "is for the gradient of a weight",
        "is for the gradient of a weight",
        "",
    ]
    odd = make_product(OF_WEIGHT, *operands(tokens=23))
    assert split.missing(odd) == "needs tokens in multiples of 4, not 23"


@pytest.mark.parametrize(("name", "splits"), [("quack", [1, 1, 4]), ("quack-unsplit", [1])])
def test_quack_gets_the_operands_as_they_lie(name, splits, monkeypatch):
    found = []

    def gemm(A, B, out=None, *, tuned=True, split_k=1):
        assert not tuned
        found.append(split_k)
        return torch.mm(A, B, out=out)

    module_with(monkeypatch, "quack.gemm_interface", gemm=gemm)
    provider = next(provider for provider in PRODUCT_PROVIDERS["cuda"] if provider.name == name)
    directions = DIRECTIONS if name == "quack" else [OF_WEIGHT]
    for direction in directions:
        product = make_product(direction, *operands())
        provider.prepare(product)()
        expected = gradients_of_a_linear(*operands())[direction]
        torch.testing.assert_close(product.output.double(), expected, rtol=1e-5, atol=1e-5)
    assert found == splits


def test_quack_without_splits_is_for_the_gradient_of_a_weight():
    unsplit = next(provider for provider in PRODUCT_PROVIDERS["cuda"] if provider.name == "quack-unsplit")
    reasons = [unsplit.missing(make_product(direction, *operands(torch.bfloat16))) for direction in DIRECTIONS]
    assert reasons[:2] == ["is for the gradient of a weight"] * 2 and reasons[2] != ""  # no quack, or no GPU


def module_with(monkeypatch, name, **functions):
    """A library that need not be installed: the named module, with these functions."""
    parent, _, _ = name.rpartition(".")
    for part in (parent, name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for function_name, function in functions.items():
        setattr(sys.modules[name], function_name, function)


@pytest.fixture
def mlp_libraries(monkeypatch):
    """quack and apex with the signatures of their releases (quack-kernels 0.6.5, apex of GitHub), in plain PyTorch.

    Returns the second biases that apex has got.
    """
    second_biases = []

    def mlp_func(
        x,
        weight1,
        weight2,
        activation,
        bias1=None,
        bias2=None,
        fuse_grad_accum=False,
        tuned=True,
        recompute=False,
        concat_layout=False,
    ):
        assert activation == "gelu_tanh_approx" and not tuned
        return linear(gelu(linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)

    def fused_dense_gelu_dense_function(input, weight1, bias1, weight2, bias2):
        second_biases.append(bias2)
        return linear(gelu(linear(input, weight1, bias1), approximate="tanh"), weight2, bias2)

    module_with(monkeypatch, "quack.mlp", mlp_func=mlp_func)
    module_with(monkeypatch, "apex.fused_dense", fused_dense_gelu_dense_function=fused_dense_gelu_dense_function)
    return second_biases


@pytest.mark.parametrize(
    "prepare",
    [
        *(of_function(call) for call in (mlp.eager_call, partial(mlp.own_call, backend="reference"), mlp.quack_call)),
        mlp.prepare_apex,
    ],
    ids=["eager", "ours", "quack", "apex"],
)
def test_every_mlp_is_the_same(prepare, mlp_libraries):
    work = mlp.make_mlp_work(TOKENS, 6, 24, "cpu", torch.float32)
    wide = work.to(torch.float64)
    expected, _ = op_results(partial(mlp.eager_call, wide), wide)
    assert set(expected) == {"output", *(f"gradient of {name}" for name in ("x", "weight1", "bias1", "weight2"))}
    found, _ = op_results(prepare(work), work)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-5)


def test_apex_gets_the_same_zeros_in_every_call(mlp_libraries):
    call = mlp.prepare_apex(mlp.make_mlp_work(TOKENS, 6, 24, "cpu", torch.float32))
    call(), call()
    assert mlp_libraries[0] is mlp_libraries[1]


def test_quack_may_multiply_for_our_mlp(monkeypatch):
    stand_in = install(monkeypatch, QuackStandIn())
    provider = next(provider for provider in mlp.MLP_PROVIDERS if provider.name == "ours-quack")
    work = mlp.make_mlp_work(TOKENS, 8, 24, "cpu", torch.float32)
    wide = work.to(torch.float64)
    expected, _ = op_results(partial(mlp.eager_call, wide), wide)
    found, _ = op_results(provider.prepare(work), work)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    assert [name for name, *_ in stand_in.called] == ["gemm_act", "gemm", "gemm_dact", "gemm"]


def test_rows_say_that_quack_is_not_tuned(monkeypatch):
    installed = {"quack-kernels": "0.6.5", "opensora_fast": "0.1.0"}
    monkeypatch.setattr(
        "opensora_fast.benchmarks.measuring.provider.installed_version", lambda name: installed.get(name, "")
    )
    providers = (*PRODUCT_PROVIDERS["cuda"], *mlp.MLP_PROVIDERS, *BLOCK_PROVIDERS)
    versions = {(provider.name, provider.version()) for provider in providers if "quack" in provider.name}
    alone = {(name, "0.6.5, untuned") for name in ("quack", "quack-unsplit")}
    assert versions == alone | {("ours-quack", "0.1.0 quack 0.6.5, untuned")}
    installed.clear()
    assert quack_version() == ""


def test_the_products_of_an_mlp_are_counted():
    forward, both = mlp.count_mlp(tokens=10, channels=2, hidden=8, element=2)
    assert (forward.flops, both.flops) == (2 * 10 * 2 * 8 * 2, 3 * 2 * 10 * 2 * 8 * 2)
    weights = 2 * (8 * 2)
    assert forward.bytes == 2 * (10 * (2 + 8 + 8 + 8 + 2) + weights)
    # One line for each product: what it reads of the tokens, what it writes.
    products = [2 + 8 + 8, 2 + 8, 8 + 2, 8 + 2]  # before the GELU, weight2, x, weight1
    backward = 2 * (10 * sum(products) + 2 * weights)
    assert both.bytes == forward.bytes + backward
