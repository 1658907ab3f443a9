"""quack's functions for matrix products in plain PyTorch, with their signatures and what they ask of their operands."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import gelu

gelu_backward = torch.ops.aten.gelu_backward.grad_input


class QuackStandIn(SimpleNamespace):
    """In the place of `quack.gemm_interface` of quack-kernels 0.6.5; `called` lists (function, M, S, P, bias or not).

    Its kernels for matrices read 16 bytes at once along the dimension whose stride is 1, of rows that begin at
    multiples of 16 bytes; the bias they read 8 bytes at once.
    """

    def __init__(self) -> None:
        super().__init__(called=[])

    def gemm(
        self,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        out_dtype: torch.dtype | None = None,
        *,
        dynamic_scheduler: bool = False,
        tuned: bool = True,
        split_k: int | None = 1,
    ) -> Tensor:
        return self._multiply("gemm", A, B, None, out, bias, tuned)

    def gemm_add(
        self,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        out_dtype: torch.dtype | None = None,
        *,
        dynamic_scheduler: bool = False,
        tuned: bool = True,
        split_k: int | None = 1,
    ) -> Tensor:
        return self._multiply("gemm_add", A, B, C, out, bias, tuned)

    def gemm_act(
        self,
        A: Tensor,
        B: Tensor,
        C: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        alpha: float = 1.0,
        preact_out: Tensor | None = None,
        postact_out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        postact_dtype: torch.dtype | None = None,
        cu_seqlens_m: Tensor | None = None,
        A_idx: Tensor | None = None,
        store_preact: bool = True,
        dynamic_scheduler: bool = False,
        tuned: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        assert activation == "gelu_tanh_approx" and preact_out is None
        before = self._multiply("gemm_act", A, B, C, postact_out, bias, tuned)
        return before if store_preact else None, gelu(before, approximate="tanh")

    def gemm_dact(
        self,
        A: Tensor,
        B: Tensor,
        PreAct: Tensor,
        activation: str | None = None,
        dx_out: Tensor | None = None,
        postact_out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        postact_dtype: torch.dtype | None = None,
        colvec_scale: Tensor | None = None,
        colvec_reduce: bool = False,
        cu_seqlens_m: Tensor | None = None,
        A_idx: Tensor | None = None,
        dynamic_scheduler: bool = True,
        tuned: bool = True,
    ) -> tuple[Tensor, Tensor]:
        assert activation == "gelu_tanh_approx" and postact_out is None
        assert PreAct.shape == (A.shape[0], B.shape[1])
        check_matrix(PreAct, A.dtype)
        gradient = self._multiply("gemm_dact", A, B, None, dx_out, None, tuned)
        # In place: the product holds nothing but its results.
        gelu_backward(gradient, PreAct, approximate="tanh", grad_input=gradient)
        return gradient, gelu(PreAct, approximate="tanh")

    def _multiply(
        self,
        name: str,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        out: Tensor | None,
        bias: Tensor | None,
        tuned: bool,
    ) -> Tensor:
        assert not tuned, "tuning takes minutes for each shape"
        assert out is None
        for matrix in (A, B, C):
            if matrix is not None:
                check_matrix(matrix, A.dtype)
        assert C is None or C.shape == (A.shape[0], B.shape[1])
        if bias is not None:
            assert bias.dtype == A.dtype and bias.shape == (B.shape[1],)
            assert bias.is_contiguous() and bias.data_ptr() % 8 == 0
        self.called.append((name, *A.shape, B.shape[1], bias is not None))
        term = bias if C is None else C
        return A @ B if term is None else torch.addmm(term, A, B)


def install(monkeypatch: pytest.MonkeyPatch, quack: QuackStandIn) -> QuackStandIn:
    """`quack` on a machine that has it, and may use it."""
    linear = importlib.import_module("opensora_fast.kernels.linear")  # the package's attribute is the function
    monkeypatch.setattr(linear, "load_quack", lambda: quack)
    monkeypatch.setattr(linear, "check_quack", lambda device, dtype, sizes=(): None)
    return quack


def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    return [output, *torch.autograd.grad(output, inputs, weights.view(output.shape).to(output.dtype))]


def check_one_graph(call: Callable[..., Tensor], inputs: list[Tensor], quack: QuackStandIn) -> None:
    """Compiled, `call` is one graph that calls quack as it does eagerly, and computes the same."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    expected = run(call, inputs)
    eager_calls = list(quack.called)
    quack.called.clear()
    found = run(torch.compile(call, fullgraph=True, backend=backend), inputs)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference)
    assert len(graphs) == 1 and quack.called == eager_calls


def check_autocast(call: Callable[..., Tensor], inputs: list[Tensor], exact: list[Tensor]) -> None:
    """Under autocast the output [0] is of half precision, and gradients have the dtypes of `inputs`, x and the weight
    first; `exact` holds output and gradients in float64."""
    with torch.autocast("cpu", torch.bfloat16):
        found = run(call, inputs)
        again = functional.linear(inputs[0], inputs[1])  # autocast's copy of the weight still has its gradient
        assert again.requires_grad
    assert found[0].dtype == torch.bfloat16
    for tensor, ours, reference in zip([found[0], *inputs], found, exact, strict=True):
        assert ours.dtype == tensor.dtype
        torch.testing.assert_close(ours.double(), reference, rtol=0.03, atol=0.03)


def check_matrix(matrix: Tensor, dtype: torch.dtype) -> None:
    assert matrix.ndim == 2 and matrix.dtype == dtype
    assert not torch.is_grad_enabled() or not matrix.requires_grad
    along, across = sorted(matrix.stride())
    assert along == 1 and across * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
