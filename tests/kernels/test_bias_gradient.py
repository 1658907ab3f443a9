"""The gradient of a Linear's bias, found by the attention behind it: against float64 and against eager."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from opensora_fast.kernels import PackLayout, TextLayout, cross_attention, spatial_attention, temporal_attention

HEADS, HEAD_SIZE = 2, 8
OPS = ("spatial_attention", "temporal_attention", "cross_attention")
# Odd frames and a lone token; for spatial attention some frames more, for the others videos for small and large
# temporal tiles and for the kernels of long ones, whose 200 frames would only be the same again.
FRAMES = [(2, 3, 3), (1, 1, 1), (5, 1, 2), (4, 1, 1)]
VIDEOS = [(2, 3, 3), (1, 1, 1), (70, 1, 2), (130, 1, 1)]
TEXTS = [5, 0, 3, 1]


def make_op(op: str, device: torch.device, shapes=VIDEOS, texts=TEXTS) -> tuple[Callable[..., Tensor], int, tuple]:
    """(op(projected, bias, backend), tokens of the pack, shape of the bias)."""
    layout = PackLayout.of(shapes, device)
    shape = (HEADS, HEAD_SIZE) if op == "cross_attention" else (3, HEADS, HEAD_SIZE)
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(layout.max_frames, HEAD_SIZE // 2, generator=generator).to(device)
    kv = torch.randn(sum(texts), 2, HEADS, HEAD_SIZE, generator=generator).to(device)
    weights = [(1 + torch.randn(HEAD_SIZE, generator=generator) / 4).to(device) for _ in range(2)]

    def run(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        q_weight, k_weight = (weight.to(x.dtype) for weight in weights)
        if op == "spatial_attention":
            return spatial_attention(x, q_weight, k_weight, layout, qkv_bias=bias, backend=backend)
        if op == "temporal_attention":
            cos, sin = angles.cos(), angles.sin()
            return temporal_attention(x, q_weight, k_weight, cos, sin, layout, qkv_bias=bias, backend=backend)
        text = TextLayout.from_lengths(texts, device)
        return cross_attention(x, kv.to(x.dtype), layout, text, q_bias=bias, backend=backend)

    return run, layout.num_tokens, shape


def make_inputs(tokens: int, shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, *shape, generator=generator).to(device, dtype)
    bias = torch.randn(shape, generator=generator).to(device, dtype)
    return x.requires_grad_(), bias.requires_grad_()


def gradients(run, x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    output = run(x, bias, backend)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    return torch.autograd.grad((output.double() * weight).sum(), (x, bias))


@pytest.mark.parametrize("op", OPS)
def test_the_bias_receives_the_sum_over_the_tokens(op, dtype, device, assert_as_accurate_as_eager) -> None:
    run, tokens, shape = make_op(op, device, FRAMES if op == "spatial_attention" else VIDEOS)
    inputs = make_inputs(tokens, shape, dtype, device)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(run, *exact_inputs, "reference")
    torch.testing.assert_close(exact[1], exact[0].sum(0))
    ours, eager = gradients(run, *inputs, "triton"), gradients(run, *inputs, "reference")
    for name, our, same_dtype, right in zip(("x", "bias"), ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, our, same_dtype, right, 3.0)


def test_large_frames_and_small_ones_in_one_pack(device, assert_as_accurate_as_eager) -> None:
    run, tokens, shape = make_op("spatial_attention", device, [(1, 3, 3), (1, 14, 29)], [1, 1])
    inputs = make_inputs(tokens, shape, torch.float16, device)
    exact = gradients(run, *(tensor.detach().double().requires_grad_() for tensor in inputs), "reference")
    ours, eager = gradients(run, *inputs, "triton"), gradients(run, *inputs, "reference")
    assert_as_accurate_as_eager("bias", ours[1], eager[1], exact[1], 3.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_the_value_of_the_bias_changes_nothing(op, backend, device) -> None:
    run, tokens, shape = make_op(op, device, [(2, 2, 3)], [4])
    x, bias = make_inputs(tokens, shape, torch.float32, device)
    assert torch.equal(run(x, bias, backend), run(x, None, backend))
    assert torch.equal(run(x, bias * 1e6, backend), run(x, None, backend))


@pytest.mark.parametrize("op", OPS)
def test_a_bias_of_another_dtype_and_layout_keeps_them(op, device) -> None:
    run, tokens, shape = make_op(op, device, [(2, 2, 3)], [4])
    x, _ = make_inputs(tokens, shape, torch.float16, device)
    whole = torch.zeros(*shape, 2, device=device, requires_grad=True)  # float32, as under autocast, and strided
    d_x, d_whole = gradients(lambda x, whole, backend: run(x, whole[..., 1], backend), x, whole, "triton")
    assert d_whole.dtype == torch.float32 and (d_whole[..., 0] == 0).all()
    torch.testing.assert_close(d_whole[..., 1], d_x.float().sum(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS)
def test_what_a_bias_of_fewer_bits_receives_is_rounded_once(op, device) -> None:
    """The gradient of each token is less than a number of float16 may be, their sum is not."""
    run, tokens, shape = make_op(op, device, [(1, 8, 8)], [1])
    x, bias = make_inputs(tokens, shape, torch.float32, device)
    leaves = x, bias.detach().half().requires_grad_()
    d_x, d_bias = torch.autograd.grad(
        run(*leaves, "triton"), leaves, torch.full((tokens, HEADS, HEAD_SIZE), 2e-8, device=device)
    )
    torch.testing.assert_close(d_bias, d_x.sum(0).half(), rtol=0, atol=6e-8)
    assert op == "cross_attention" or d_bias[-1].abs().min() > 1e-6


@pytest.mark.parametrize("frozen", ["x", "bias"])
@pytest.mark.parametrize("op", OPS)
def test_only_wanted_gradients(op, frozen, device) -> None:
    run, tokens, shape = make_op(op, device, [(2, 2, 3)], [4])
    inputs = dict(zip(("x", "bias"), make_inputs(tokens, shape, torch.float32, device), strict=True))
    inputs[frozen] = inputs[frozen].detach()
    run(**inputs, backend="triton").square().sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is None) == (name == frozen)


@pytest.mark.parametrize("op", OPS)
def test_a_linear_with_the_bias_detached_has_the_gradients_of_an_ordinary_one(op, device) -> None:
    run, tokens, shape = make_op(op, device, [(2, 2, 3), (1, 1, 2)], [4, 2])
    generator = torch.Generator().manual_seed(3)
    z, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for size in ((tokens, 6), (torch.Size(shape).numel(), 6), (torch.Size(shape).numel(),))
    )
    ordinary = run(linear(z, weight, bias).unflatten(1, shape), None, "reference").square().sum()
    apart = run(linear(z, weight, bias.detach()).unflatten(1, shape), bias.unflatten(0, shape), "reference")
    expected = torch.autograd.grad(ordinary, (z, weight, bias))
    for ours, right in zip(torch.autograd.grad(apart.square().sum(), (z, weight, bias)), expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_full_graph_compilation(op, backend, device) -> None:
    run, tokens, shape = make_op(op, device, [(2, 2, 3)], [4])
    inputs = make_inputs(tokens, shape, torch.float32, device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, *inputs, backend), gradients(run, *inputs, backend), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("op", OPS)
def test_a_bias_of_a_wrong_shape_is_named(op, device) -> None:
    run, tokens, shape = make_op(op, device, [(1, 2, 2)], [2])
    x, _ = make_inputs(tokens, shape, torch.float32, device)
    with pytest.raises(ValueError, match=f"{op}: (qkv|q)_bias has shape"):
        run(x, torch.zeros(7, device=device), "triton")
