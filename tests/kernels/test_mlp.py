"""A block's MLP: the three ops by default, and where quack is named the GELU as the products' epilogue."""

import importlib
from functools import partial

import pytest
import torch
from quack_stand_in import QuackStandIn, check_autocast, check_one_graph, install, run
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from opensora_fast.kernels import calls, gelu_tanh, mlp
from opensora_fast.kernels.mlp import quack_gelu, quack_gelu_backward

TOKENS, CHANNELS, HIDDEN = 7, 16, 24
NAMES = ("x", "weight1", "bias1", "weight2")
FORWARD = [("gemm_act", TOKENS, CHANNELS, HIDDEN, True), ("gemm", TOKENS, HIDDEN, CHANNELS, False)]
OF_HIDDEN = ("gemm_dact", TOKENS, CHANNELS, HIDDEN, False)
OF_X = ("gemm", TOKENS, HIDDEN, CHANNELS, False)
by_quack = partial(mlp, linear="quack")
# `opensora_fast.kernels.linear` is the function.
linear_module = importlib.import_module("opensora_fast.kernels.linear")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> QuackStandIn:
    """quack on a machine that has it."""
    return install(monkeypatch, QuackStandIn())


def make_inputs(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, CHANNELS), (HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN))
    dtypes = (dtype, *[weight_dtype or dtype] * 3)
    return [
        (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(kind).requires_grad_()
        for size, kind in zip(sizes, dtypes, strict=True)
    ]


def three_ops(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, backend: str = "reference") -> Tensor:
    return functional.linear(gelu_tanh(functional.linear(x, weight1), bias1, backend=backend), weight2)


def run_exactly(inputs: list[Tensor]) -> list[Tensor]:
    return run(three_ops, [tensor.detach().double().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("linear", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_by_default_it_is_the_three_ops_bit_for_bit_but_for_the_order_of_one_sum(dtype, linear) -> None:
    """dW2 is made transposed (see `weight_gradient`), so its sums over the tokens may run in another order."""

    def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
        *others, of_weight2 = zip(ours, theirs, strict=True)
        for found, expected in others:
            assert torch.equal(found, expected) and found.dtype == expected.dtype
        torch.testing.assert_close(*of_weight2)

    inputs = make_inputs(dtype)
    calls.clear()
    for function in (mlp, partial(mlp, gelu="reference", linear=linear)):
        check(run(function, inputs), run(three_ops, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        check(run(mlp, inputs), run(three_ops, inputs))
    assert set(calls) == {("gelu_tanh", "reference")}


def test_an_unknown_backend_of_the_gelu_is_named_whoever_multiplies(installed) -> None:
    for linear in ("torch", "quack"):
        with pytest.raises(ValueError, match="'nonsense' is unknown; choose one of auto, reference, triton"):
            mlp(*make_inputs(torch.float32), gelu="nonsense", linear=linear)


def test_the_backend_of_the_gelu_is_the_callers() -> None:
    calls.clear()
    mlp(*make_inputs(torch.float32), gelu="triton")
    assert calls == {("gelu_tanh", "triton"): 1}


def test_quack_multiplies_all_but_the_gradients_of_the_weights(installed) -> None:
    inputs = make_inputs()
    calls.clear()
    for ours, exact in zip(run(by_quack, inputs), run_exactly(inputs), strict=True):
        torch.testing.assert_close(ours, exact)
    assert installed.called == [*FORWARD, OF_HIDDEN, OF_X]
    assert calls == {("mlp", "quack"): 1, ("gelu_tanh", "reference"): 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_errs_as_the_three_ops_do(dtype, installed) -> None:
    inputs = make_inputs(dtype)
    found, exact = run(by_quack, inputs), run_exactly(inputs)
    for ours, eager, expected in zip(found, run(three_ops, inputs), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() <= 2 * (eager.double() - expected).norm() + 1e-12


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradients_that_are_wanted_are_computed(wanted, installed) -> None:
    inputs = [tensor.requires_grad_(name == wanted) for name, tensor in zip(NAMES, make_inputs(), strict=True)]
    by_quack(*inputs).sum().backward()
    assert [name for name, tensor in zip(NAMES, inputs, strict=True) if tensor.grad is not None] == [wanted]
    assert installed.called == [*FORWARD, OF_HIDDEN, *([OF_X] if wanted == "x" else [])]


def test_of_the_hidden_layer_only_what_is_before_the_gelu_is_kept(installed) -> None:
    inputs, kept = make_inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        by_quack(*inputs)
    own = {tensor.data_ptr() for tensor in inputs}
    (before,) = [tensor for tensor in kept if tensor.data_ptr() not in own]
    x, weight1, bias1, _ = inputs
    torch.testing.assert_close(before, functional.linear(x, weight1, bias1))


@pytest.mark.parametrize("constant", ["inputs", "mode"])
def test_without_gradients_nothing_is_written_for_them(constant, installed) -> None:
    stored = []
    real = installed.gemm_act
    installed.gemm_act = lambda *given, **named: stored.append(named["store_preact"]) or real(*given, **named)
    inputs = make_inputs()
    by_quack(*inputs)
    if constant == "inputs":
        output = by_quack(*(tensor.detach() for tensor in inputs))
    else:
        with torch.no_grad():
            output = by_quack(*inputs)
    assert stored == [True, False] and not output.requires_grad
    torch.testing.assert_close(output, three_ops(*inputs).detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_can_be_recomputed(reentrant, installed) -> None:
    inputs = make_inputs()
    output = checkpoint(by_quack, *inputs, use_reentrant=reentrant)
    output.square().sum().backward()
    exact = [tensor.detach().requires_grad_() for tensor in inputs]
    expected = three_ops(*exact)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for ours, reference in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("broken", ["strided x", "odd addresses", "strided weights", "expanded gradient"])
def test_operands_that_quack_cannot_read_are_copied(broken, installed) -> None:
    inputs = [tensor.detach() for tensor in make_inputs(torch.float32)]
    if broken == "strided x":
        inputs[0] = torch.randn(TOKENS, 2 * CHANNELS)[:, ::2]
    if broken == "odd addresses":
        inputs = [torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape) for tensor in inputs]
    if broken == "strided weights":
        inputs = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output, expected = by_quack(*inputs), three_ops(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    loss = torch.sum if broken == "expanded gradient" else (lambda y: y.square().sum())
    gradients = zip(torch.autograd.grad(loss(output), inputs), torch.autograd.grad(loss(expected), exact), strict=True)
    for ours, reference in gradients:
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_quack_gets_half_precision_and_gradients_keep_their_dtypes(x_dtype, installed) -> None:
    inputs = make_inputs(x_dtype, torch.float32)
    check_autocast(by_quack, inputs, run_exactly(inputs))


@pytest.mark.parametrize(("linear", "named"), [("torch", "linear"), ("quack", "mlp")])
def test_a_second_derivative_is_refused(linear, named, installed) -> None:
    """Behind a sum, too, whose own gradient is a constant: d_x depends on W2."""
    inputs = make_inputs()
    with pytest.raises(ValueError, match=f"{named}: it has no second derivatives"):
        torch.autograd.grad(mlp(*inputs, linear=linear).sum(), inputs[0], create_graph=True)


def test_full_graph_compilation(installed) -> None:
    check_one_graph(by_quack, make_inputs(torch.float32), installed)


def test_the_registered_products_are_sound(installed) -> None:
    x, weight1, bias1, weight2 = (tensor.detach() for tensor in make_inputs(torch.float32))
    for keeps_input in (True, False):
        torch.library.opcheck(quack_gelu.op, (x, weight1, bias1, keeps_input))
    torch.library.opcheck(quack_gelu_backward.op, (x, weight2, torch.randn(TOKENS, HIDDEN)))


def test_unknown_backends_and_shapes_are_errors(installed) -> None:
    x, weight1, bias1, weight2 = make_inputs()
    with pytest.raises(ValueError, match="mlp: backend 'cutlass' is unknown; choose one of torch, quack"):
        mlp(x, weight1, bias1, weight2, linear="cutlass")
    with pytest.raises(ValueError, match="mlp: weight1 has shape"):
        by_quack(x, weight2, bias1, weight2)
    with pytest.raises(ValueError, match="mlp: bias1 has shape"):
        by_quack(x, weight1, bias1[:3], weight2)
    with pytest.raises(ValueError, match="mlp: weight2 has shape"):
        by_quack(x, weight1, bias1, weight1)
    assert not installed.called


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_quack_named_on_the_cpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="quack needs a CUDA GPU, and the tokens are on cpu; name 'torch'"):
        by_quack(*make_inputs(torch.bfloat16))


def make_gpu_inputs(dtype: torch.dtype) -> list[Tensor]:
    """x [1000, 1152], weight1 [4608, 1152], bias1 and weight2, where quack itself is installed and multiplies."""
    pytest.importorskip("quack.gemm_interface")
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) not in linear_module.QUACK_ARCHITECTURES:
        pytest.skip("quack is used on GPUs of sm_90 and sm_100")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator, device=device)).to(dtype).requires_grad_()

    return [draw(1000, 1152), draw(4608, 1152, scale=1152**-0.5), draw(4608), draw(1152, 4608, scale=4608**-0.5)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quack_itself_errs_as_the_three_ops_do(dtype) -> None:
    inputs = make_gpu_inputs(dtype)
    eager, exact = run(partial(three_ops, backend="triton"), inputs), run_exactly(inputs)
    for name, ours, theirs, expected in zip(("y", *NAMES), run(by_quack, inputs), eager, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() <= 2 * (theirs.double() - expected).norm() + 1e-12, name
    with torch.no_grad():  # what is before the GELU is not written
        torch.testing.assert_close(by_quack(*inputs), run(by_quack, inputs)[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_cuda_graph_replays_an_mlp_of_quack() -> None:
    inputs = make_gpu_inputs(torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(by_quack, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(by_quack, inputs)
    with torch.no_grad():
        inputs[0].normal_()
    for _ in range(2):
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for replayed, eager in zip(found, run(by_quack, inputs), strict=True):
            assert torch.equal(replayed, eager)
