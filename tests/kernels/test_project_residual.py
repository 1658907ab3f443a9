"""A Linear beside the residual stream it reads: the same values and gradients, one pass less."""

import pytest
import torch
from torch.nn.functional import linear

from opensora_fast.kernels import project_residual

TOKENS, CHANNELS, OUTPUTS = 7, 5, 3


def make_inputs(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, CHANNELS), (OUTPUTS, CHANNELS), (OUTPUTS,))
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype)
    return [
        torch.randn(size, generator=generator).to(kind).requires_grad_()
        for size, kind in zip(sizes, dtypes, strict=True)
    ]


def loss(on: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (on.double() ** 3).sum() + y.double().sin().sum()


def reference_gradients(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss(exact[0], linear(*exact)), exact)


def test_values_and_gradients() -> None:
    inputs = make_inputs()
    on, y = project_residual(*inputs)
    assert torch.equal(on, inputs[0]) and torch.equal(y, linear(*inputs))
    for ours, exact in zip(torch.autograd.grad(loss(on, y), inputs), reference_gradients(inputs), strict=True):
        torch.testing.assert_close(ours, exact)
    assert torch.autograd.gradcheck(project_residual, inputs)


@pytest.mark.parametrize("used", ["stream", "output"])
def test_one_of_the_two_may_go_unused(used: str) -> None:
    inputs = make_inputs()
    on, y = project_residual(*inputs)
    if used == "stream":
        on.sum().backward()
        assert torch.equal(inputs[0].grad, torch.ones_like(inputs[0])) and inputs[1].grad is None
    else:
        y.sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].sum(0).expand_as(inputs[0]))


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    x, weight, bias = make_inputs()
    on, y = project_residual(x.detach(), weight, bias.detach())
    loss(on, y).backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None
    on, y = project_residual(x, weight.detach())
    loss(on, y).backward()
    assert x.grad is not None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_is_of_half_precision_and_gradients_keep_their_dtypes(x_dtype: torch.dtype) -> None:
    inputs = make_inputs(x_dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        on, y = project_residual(*inputs)
        again = linear(inputs[0], inputs[1])  # autocast's copy of the weight still has its gradient
        assert again.requires_grad
        total = loss(on, y) + again.double().sum()
    assert (on.dtype, y.dtype) == (x_dtype, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(loss(exact[0], linear(*exact)) + linear(*exact[:2]).sum(), exact)
    for tensor, ours, reference in zip(inputs, torch.autograd.grad(total, inputs), expected, strict=True):
        assert ours.dtype == tensor.dtype
        torch.testing.assert_close(ours.double(), reference, rtol=0.03, atol=0.03)


def test_full_graph_compilation() -> None:
    inputs = make_inputs(torch.float32)
    compiled = torch.compile(lambda *tensors: loss(*project_residual(*tensors)), fullgraph=True, backend="aot_eager")
    for ours, exact in zip(torch.autograd.grad(compiled(*inputs), inputs), reference_gradients(inputs), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "shape", "name"), [(0, (TOKENS,), "x"), (1, (OUTPUTS, 4), "weight"), (2, (4,), "bias")]
)
def test_shapes_that_do_not_fit_are_errors(position: int, shape: tuple[int, ...], name: str) -> None:
    inputs = make_inputs()
    inputs[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"project_residual: {name} has shape"):
        project_residual(*inputs)
