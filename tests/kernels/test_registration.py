"""`KernelOp`: eager calls go around the dispatcher, and everything that looks at ops still sees them."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast.kernels.dispatch import choose_backend
from opensora_fast.kernels.registration import kernel_op, output_dtype

calls: list[str] = []


@kernel_op("opensora_fast_tests::double")
def double(x: Tensor, factor: float) -> Tensor:
    calls.append("double")
    return x * factor


@double.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def _backward(ctx, gradient):
    return gradient * ctx.factor, None


double.register_autograd(_backward, setup_context=_setup_context)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


def test_values_and_gradients() -> None:
    for call in (double, double.op):
        x = torch.ones(3, requires_grad=True)
        double_x = call(x, 2.0)
        double_x.sum().backward()
        assert torch.equal(double_x, torch.full((3,), 2.0)) and torch.equal(x.grad, torch.full((3,), 2.0))


def test_an_eager_call_does_not_pass_the_dispatcher() -> None:
    name = type(double(torch.ones(1, requires_grad=True), 2.0).grad_fn).__name__
    assert name == "doubleBackward"
    assert "GeneratedBackward" in type(double.op(torch.ones(1, requires_grad=True), 2.0).grad_fn).__name__


def test_a_dispatch_mode_sees_the_op() -> None:
    with Names() as mode:
        double(torch.ones(3), 2.0)
    assert "opensora_fast_tests::double" in mode.names


def test_a_compiler_sees_the_op_and_does_not_run_it_while_tracing() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    calls.clear()
    compiled = torch.compile(lambda x: double(x, 3.0) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4.0))
    assert any("opensora_fast_tests.double" in str(node.target) for node in graphs[0].graph.nodes)
    assert calls == ["double"]


@kernel_op("opensora_fast_tests::add")
def add(x: Tensor, y: Tensor) -> Tensor:
    assert x.data_ptr() and y.data_ptr()  # as a kernel reads them
    return x + y


class Wrapped(Tensor):
    """As what a collective of PyTorch's returns before it is over: the numbers are in another tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return function(*[value.inner if type(value) is cls else value for value in arguments], **(keywords or {}))


@pytest.mark.parametrize("place", [0, 1])
def test_a_subclass_of_tensor_is_unwrapped_before_a_kernel_reads_it(place) -> None:
    arguments = [torch.ones(3), torch.arange(3.0)]
    expected = add(*arguments)
    arguments[place] = Wrapped(arguments[place])
    assert torch.equal(add(*arguments), expected)


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_a_second_derivative_is_refused_and_never_left_out(loss) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="double: it has no second derivatives"):
        (gradient,) = torch.autograd.grad(loss(double(x, 2.0)), x, create_graph=True)
        torch.autograd.grad((gradient + x).square().sum(), x)
    with pytest.raises(ValueError, match=r"double: .* torch\.autograd\.functional\.jvp ask for; use the first only"):
        torch.autograd.functional.jvp(lambda x: loss(double(x, 2.0)), x, torch.ones(3))


def test_derivatives_in_forward_mode_are_refused_and_never_zero() -> None:
    """PyTorch's registered ops leave them out without a word."""
    x = torch.ones(3)

    def differentiate(x):
        return torch.func.jvp(lambda x: double(x, 2.0), (x,), (x,))

    for function in (differentiate, torch.compile(differentiate, backend="eager")):
        with pytest.raises(ValueError, match="double: .* forward mode .* use backend='reference', or backward()"):
            function(x)
    with pytest.raises(ValueError, match="double: .* forward mode"), forward_ad.dual_level(), Names():
        double(forward_ad.make_dual(x, x), 2.0)
    with pytest.raises(NotImplementedError, match="jvp"), forward_ad.dual_level():
        double(forward_ad.make_dual(x, x), 2.0)


def test_auto_takes_the_reference_for_float64() -> None:
    x = torch.zeros(1)
    assert choose_backend("op", "auto", x.double()) == "reference"
    with pytest.raises(
        ValueError, match="op: its Triton kernel takes float32, float16 and bfloat16, got torch.float64"
    ):
        choose_backend("op", "triton", x, None, x.double())


def test_output_dtype() -> None:
    x, half = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    assert output_dtype(half, x, None) == torch.float32 and output_dtype(half, half) == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output_dtype(x) == torch.bfloat16 and output_dtype(x.double()) == torch.float64
