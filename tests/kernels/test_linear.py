"""A Linear by the library that is named: cuBLAS's numbers bit for bit by default, quack's functions where asked for."""

import importlib
from functools import partial
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from quack_stand_in import QuackStandIn, check_autocast, check_one_graph, install, run
from torch import Tensor
from torch.nn import functional

from opensora_fast.kernels import calls, linear, project_residual
from opensora_fast.kernels.linear import (
    Linear,
    check_quack,
    load_quack,
    multiply_with_quack,
    quack_product,
    weight_gradient,
)
from opensora_fast.kernels.project_residual import ProjectResidual

TOKENS, CHANNELS, OUTPUTS = 7, 16, 24
# `opensora_fast.kernels.linear` is the function.
module = importlib.import_module("opensora_fast.kernels.linear")


@pytest.fixture
def quack() -> QuackStandIn:
    return QuackStandIn()


@pytest.fixture
def installed(quack: QuackStandIn, monkeypatch: pytest.MonkeyPatch) -> QuackStandIn:
    """quack on a machine that has it."""
    return install(monkeypatch, quack)


def make_inputs(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, CHANNELS), (OUTPUTS, CHANNELS), (OUTPUTS,))
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype)
    return [
        torch.randn(size, generator=generator).to(kind).requires_grad_()
        for size, kind in zip(sizes, dtypes, strict=True)
    ]


def run_exactly(inputs: list[Tensor]) -> list[Tensor]:
    return run(functional.linear, [tensor.detach().double().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_by_default_it_is_the_linear_of_pytorch_bit_for_bit(dtype, backend) -> None:
    inputs = make_inputs(dtype)
    calls.clear()
    for function in (linear, partial(linear, backend=backend)):
        for ours, theirs in zip(run(function, inputs), run(functional.linear, inputs), strict=True):
            assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(run(linear, inputs), run(functional.linear, inputs), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert not calls


def test_quack_multiplies_forward_and_for_the_gradient_of_the_input(quack) -> None:
    inputs = make_inputs()
    found = run(lambda *tensors: Linear.apply(*tensors, partial(multiply_with_quack, quack)), inputs)
    for ours, exact in zip(found, run_exactly(inputs), strict=True):
        torch.testing.assert_close(ours, exact)
    assert quack.called == [("gemm", TOKENS, CHANNELS, OUTPUTS, True), ("gemm", TOKENS, OUTPUTS, CHANNELS, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_errs_as_pytorch_does(dtype, quack) -> None:
    inputs = make_inputs(dtype)
    exact = run_exactly(inputs)
    found = run(lambda *tensors: Linear.apply(*tensors, partial(multiply_with_quack, quack)), inputs)
    for ours, eager, expected in zip(found, run(functional.linear, inputs), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() <= 2 * (eager.double() - expected).norm() + 1e-12


def test_only_the_gradients_that_are_wanted_are_computed(quack) -> None:
    x, weight, bias = make_inputs()
    apply = partial(multiply_with_quack, quack)
    Linear.apply(x.detach(), weight, bias.detach(), apply).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None
    assert len(quack.called) == 1
    weight.grad = None
    Linear.apply(x, weight.detach(), None, apply).sum().backward()
    assert weight.grad is None and x.grad is not None
    assert quack.called[1:] == [("gemm", TOKENS, CHANNELS, OUTPUTS, False), ("gemm", TOKENS, OUTPUTS, CHANNELS, False)]


@pytest.mark.parametrize("widths", [(CHANNELS, OUTPUTS), (OUTPUTS, CHANNELS), (CHANNELS, CHANNELS)])
def test_the_gradient_of_a_weight_lies_as_the_weight_does(widths) -> None:
    """So that autograd keeps it as it is, and an optimizer can copy it with those of other weights."""
    x, d_y = (torch.randn(TOKENS, width, dtype=torch.float64) for width in widths)
    gradient = weight_gradient(d_y, x)
    torch.testing.assert_close(gradient, torch.einsum("nk,nc->kc", d_y, x))
    assert gradient.is_contiguous() and gradient._base is None


@pytest.mark.parametrize("broken", ["strided x", "odd address", "strided weight", "expanded gradient"])
def test_operands_that_quack_cannot_read_are_copied(broken, quack) -> None:
    x, weight, bias = (tensor.detach() for tensor in make_inputs(torch.float32))
    if broken == "strided x":
        x = torch.randn(TOKENS, 2 * CHANNELS)[:, ::2]
    if broken == "odd address":
        weight = torch.randn(OUTPUTS * CHANNELS + 1)[1:].view(OUTPUTS, CHANNELS)
        bias = torch.randn(OUTPUTS + 1)[1:]
    if broken == "strided weight":
        weight = torch.randn(OUTPUTS, CHANNELS, 2)[..., 1]
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    output = Linear.apply(*inputs, partial(multiply_with_quack, quack))
    gradients = torch.autograd.grad(output.sum() if broken == "expanded gradient" else output.square().sum(), inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = functional.linear(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    total = expected.sum() if broken == "expanded gradient" else expected.square().sum()
    for ours, reference in zip(gradients, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_quack_gets_half_precision_and_gradients_keep_their_dtypes(x_dtype, installed) -> None:
    inputs = make_inputs(x_dtype, torch.float32)
    check_autocast(partial(linear, backend="quack"), inputs, run_exactly(inputs))


def test_calls_of_quack_are_counted(installed) -> None:
    calls.clear()
    x, weight, bias = make_inputs()
    linear(x, weight, backend="quack")
    project_residual(x, weight, bias, backend="quack")
    assert calls == {("linear", "quack"): 1, ("project_residual", "quack"): 1}
    assert len(installed.called) == 2


def stream_loss(on: Tensor, y: Tensor) -> Tensor:
    return (on.double() ** 3).sum() + y.double().sin().sum()


def test_a_residual_stream_is_added_in_the_product(quack) -> None:
    inputs = make_inputs()
    on, y = ProjectResidual.apply(*inputs, partial(multiply_with_quack, quack))
    exact = [tensor.detach().requires_grad_() for tensor in inputs]
    gradients = torch.autograd.grad(stream_loss(on, y), inputs)
    expected = torch.autograd.grad(stream_loss(exact[0], functional.linear(*exact)), exact)
    for ours, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference)
    assert quack.called == [
        ("gemm", TOKENS, CHANNELS, OUTPUTS, True),
        ("gemm_add", TOKENS, OUTPUTS, CHANNELS, False),
    ]


def test_a_residual_stream_under_autocast_is_added_apart(quack) -> None:
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        on, y = ProjectResidual.apply(*inputs, partial(multiply_with_quack, quack))
    torch.autograd.grad(stream_loss(on, y), inputs)
    assert [name for name, *_ in quack.called] == ["gemm", "gemm"]


@pytest.mark.parametrize("op", ["linear", "project_residual"])
def test_full_graph_compilation(op, installed) -> None:
    def call(*inputs: Tensor) -> Tensor:
        output = {"linear": linear, "project_residual": project_residual}[op](*inputs, backend="quack")
        return output if op == "linear" else torch.cat(output, 1)

    check_one_graph(call, make_inputs(torch.float32), installed)


def test_the_registered_product_is_sound(installed) -> None:
    x, weight, bias = (tensor.detach().float() for tensor in make_inputs())
    added = torch.randn(TOKENS, OUTPUTS)
    for arguments in ((x, weight.t(), None, None), (x, weight.t(), None, bias), (x, weight.t(), added, None)):
        torch.library.opcheck(quack_product.op, arguments)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "sizes", "message"),
    [
        (
            torch.device("cpu"),
            (9, 0),
            torch.bfloat16,
            (),
            "needs a CUDA GPU, and the tokens are on cpu; name 'torch' in its place",
        ),
        (GPU, (8, 0), torch.bfloat16, (), "GPUs of sm_90 and sm_100, and cuda:0 has sm_80; name 'torch' in its place"),
        (
            GPU,
            (9, 0),
            torch.float32,
            (),
            "float16 and bfloat16, got torch.float32; name 'torch' in its place, or use a",
        ),
        (GPU, (9, 0), torch.bfloat16, (1152, 12), "channels in multiples of 8, got 12; name 'torch' in its place"),
        (GPU, (9, 0), torch.bfloat16, (1152, 4608), r'not installed; pip install "quack-kernels\[cu13\]==0.6.5"'),
    ],
)
def test_where_quack_cannot_multiply_the_error_names_the_fix(
    device, capability, dtype, sizes, message, monkeypatch
) -> None:
    def not_there(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", not_there)
    monkeypatch.setattr(module, "load_quack", load_quack.__wrapped__)
    monkeypatch.setattr(module, "_get_capability", lambda device: capability)
    with pytest.raises(ValueError, match="linear: quack .*" + message):
        check_quack(device, dtype, sizes)


def test_a_quack_that_does_not_import_is_an_error(monkeypatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("No CTK flavor installed")

    monkeypatch.setattr(module, "version", lambda name: "0.6.5")
    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(RuntimeError: No CTK flavor installed\); pip install"):
        load_quack.__wrapped__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_quack_named_on_the_cpu_is_an_error() -> None:
    x, weight, bias = make_inputs(torch.bfloat16)
    for function in (linear, project_residual):
        with pytest.raises(ValueError, match="needs a CUDA GPU"):
            function(x, weight, bias, backend="quack")


@pytest.mark.parametrize("function", [linear, project_residual])
def test_unknown_backends_and_shapes_are_errors(function, installed) -> None:
    x, weight, bias = make_inputs()
    with pytest.raises(ValueError, match="backend 'cutlass' is unknown; choose one of torch, quack"):
        function(x, weight, backend="cutlass")
    with pytest.raises(ValueError, match="weight has shape"):
        function(x, weight.t(), backend="quack")
    with pytest.raises(ValueError, match="bias has shape"):
        function(x, weight, bias[:3], backend="quack")
    assert not installed.called


@pytest.fixture
def gpu_inputs() -> list[Tensor]:
    """x [1000, 1152], weight [3456, 1152] and bias, where quack itself is installed and multiplies."""
    pytest.importorskip("quack.gemm_interface")
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) not in module.QUACK_ARCHITECTURES:
        pytest.skip("quack is used on GPUs of sm_90 and sm_100")
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
        for size in ((1000, 1152), (3456, 1152), (3456,))
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("op", [linear, project_residual], ids=["linear", "project_residual"])
def test_quack_itself_errs_as_cublas_does(op, gpu_inputs) -> None:
    def call(backend: str, *inputs: Tensor) -> Tensor:
        output = op(*inputs, backend=backend)
        return output if op is linear else torch.cat([output[0].square(), output[1]], 1)

    exact = run(partial(call, "torch"), [tensor.detach().double().requires_grad_() for tensor in gpu_inputs])
    eager = run(partial(call, "torch"), gpu_inputs)
    for ours, theirs, expected in zip(run(partial(call, "quack"), gpu_inputs), eager, exact, strict=True):
        assert (ours.double() - expected).norm() <= 2 * (theirs.double() - expected).norm() + 1e-12


@pytest.mark.gpu
def test_a_cuda_graph_replays_products_of_quack(gpu_inputs) -> None:
    x, weight, bias = gpu_inputs

    def step() -> list[Tensor]:
        on, y = project_residual(x, weight, bias, backend="quack")
        output = linear(on, weight, backend="quack") + y
        return [output, *torch.autograd.grad(output.square().mean(), (x, weight, bias))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    for replayed, eager in zip(found, step(), strict=True):
        assert torch.equal(replayed, eager)
