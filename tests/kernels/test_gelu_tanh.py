"""`gelu_tanh`: Triton against float64 and against eager."""

from functools import partial

import pytest
import torch
from torch import Tensor

from opensora_fast.kernels import gelu_tanh

ours, reference = partial(gelu_tanh, backend="triton"), partial(gelu_tanh, backend="reference")


def make_inputs(tokens: int, channels: int, dtype: torch.dtype, device: torch.device, bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator).to(device, dtype) * 3
    added = torch.randn(channels, generator=generator).to(device, dtype)
    return {"x": x.requires_grad_(), "bias": added.requires_grad_() if bias else None}


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (3, 8), (70, 144), (129, 520)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_output_and_gradients(tokens, channels, bias, dtype, device, compare_with_eager) -> None:
    compare_with_eager(ours, reference, make_inputs(tokens, channels, dtype, device, bias))


def test_more_tiles_than_the_sum_takes_at_once(device, compare_with_eager) -> None:
    compare_with_eager(ours, reference, make_inputs(64 * 70 + 1, 2, torch.float32, device))


def test_strided_and_expanded_inputs(dtype, device, compare_with_eager) -> None:
    inputs = make_inputs(6, 24, dtype, device)
    inputs["x"] = inputs["x"].detach().t().contiguous().t().requires_grad_()
    inputs["bias"] = inputs["bias"].detach()[:1].expand(24).requires_grad_()
    compare_with_eager(ours, reference, inputs, expanded_gradient=True)


def test_large_values(dtype, device) -> None:
    x = torch.tensor([[-6e4, -300.0, -20.0, -6.0, 0.0, 6.0, 20.0, 6e4]], device=device, dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [function(leaf) for function, leaf in zip((ours, reference), leaves, strict=True)]
    torch.testing.assert_close(*outputs, rtol=2e-3, atol=1e-6)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_values_whose_cubes_are_beyond_float32(dtype, device) -> None:
    """All or nothing of each passes, of its gradient too."""
    x = torch.tensor([[-1e18, -1e15, -1e12, 1e12, 1e15, 1e18]], device=device, dtype=dtype, requires_grad=True)
    output = ours(x)
    output.backward(torch.ones_like(output))
    assert torch.equal(output, x.relu()) and torch.equal(x.grad, (x > 0).to(dtype))


def test_mixed_dtypes(device, compare_with_eager) -> None:
    inputs = make_inputs(5, 16, torch.float32, device)
    inputs["x"] = inputs["x"].detach().half().requires_grad_()
    compare_with_eager(ours, reference, inputs)


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_the_wanted_gradient(wanted, device) -> None:
    inputs = make_inputs(5, 16, torch.float32, device)
    gradients = []
    for function in (ours, reference):
        leaves = {name: tensor.detach().clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
        function(**leaves).square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, gradient in gradients[0].items() if gradient is not None] == [wanted]
    torch.testing.assert_close(gradients[0][wanted], gradients[1][wanted])


def test_two_backwards_are_equal_bit_for_bit(dtype, device) -> None:
    gradients: list[list[Tensor]] = []
    for _ in range(2):
        inputs = make_inputs(200, 40, dtype, device)
        ours(**inputs).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs.values()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_gives_what_the_next_linear_reads(backend, device) -> None:
    inputs = make_inputs(3, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.float16):
        assert gelu_tanh(**inputs, backend=backend).dtype == torch.float16


def test_registration_and_full_graph_compilation(device) -> None:
    inputs = make_inputs(3, 8, torch.float32, device)
    torch.library.opcheck(torch.ops.opensora_fast.gelu_tanh.default, (*inputs.values(), torch.float32))
    gradients = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs(3, 8, torch.float32, device)
        function(**inputs).sin().sum().backward()
        gradients.append([tensor.grad for tensor in inputs.values()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_wrong_arguments_are_named(device) -> None:
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match="gelu_tanh: x must be a tensor, got NoneType"):
        ours(None)
    with pytest.raises(ValueError, match="gelu_tanh: x has shape"):
        ours(x[0])
    with pytest.raises(ValueError, match="gelu_tanh: bias has shape"):
        ours(x, torch.zeros(7, device=device))
    with pytest.raises(ValueError, match="gelu_tanh: bias is on meta"):
        ours(x, torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match="gelu_tanh: x has dtype torch.int32"):
        ours(x.int())
    with pytest.raises(ValueError, match="its Triton kernel takes float32, float16 and bfloat16, got torch.float64"):
        ours(x.double())
