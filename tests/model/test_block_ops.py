"""What a block computes between its matrix products when every op is a kernel: nothing else of full size."""

import importlib
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from quack_stand_in import QuackStandIn, install
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast import STDiT2, STDiT2Config, use_kernels
from opensora_fast.kernels.registration import KernelOp

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
# They take memory, and neither read nor write it.
ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}


# An addition once a step, where the stream enters: the first block's norm is an op of its own, beside the residual
# connection. In each of the two blocks the gradient of the spatial qkv bias, which a sum of its own finds sooner, and
# that of fc2's weight, as large as these few tokens, laid out anew (see `kernels.linear.weight_gradient`).
PLAIN = {"aten::add.Tensor": 1, "aten::sum.dim_IntList": 2, "aten::clone": 2}


class LargeOps(TorchDispatchMode):
    """Collects ops of PyTorch, other than views and matrix products, that read or write at least `size` numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: Counter[str] = Counter()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        items = *arguments, *(keywords or {}).values(), result
        tensors = [item for item in items if isinstance(item, torch.Tensor)]
        if not function.is_view and function not in PRODUCTS | ALLOCATIONS:
            if any(tensor.numel() >= self.size for tensor in tensors):
                self.found[function.name()] += 1
        return result

    def call_kernel(self, op: KernelOp, *arguments):
        """As eager calls do: around the dispatcher, so that what the op itself leaves to PyTorch is seen too."""
        self.kernels.add(op.function.__name__.removeprefix("_"))
        return op._direct(*arguments)


@pytest.fixture
def no_launch(monkeypatch) -> None:
    """Interpreted kernels return at once: their results do not matter here, and the interpreter copies tensors."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **keywords: None)


def run_two_blocks(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    given_frames: bool = False,
    linear: str | None = None,
) -> LargeOps:
    """Two blocks forward and backward on videos of two shapes; the first makes the norm of the second."""
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config.small(depth=2, caption_channels=32, model_max_length=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.to(device, dtype)
    use_kernels(model, backend=backend, linear=linear)
    given = []
    real = STDiT2.run_blocks
    sizes = {"height": 64.0, "width": 64.0, "ar": 1.0, "num_frames": 4.0, "fps": 24.0}
    videos = [torch.randn(4, 4, 8, 8, device=device), torch.randn(4, 3, 6, 10, device=device)]
    with patch.object(STDiT2, "run_blocks", lambda self, *given_: given.append(given_) or real(self, *given_)):
        model.forward_packed(
            videos,
            torch.tensor([3.0, 500.0]),
            torch.randn(2, 1, 8, 32),
            x_masks=[torch.tensor([False, True, True, False]), None] if given_frames else None,
            **{name: torch.full((2,), value) for name, value in sizes.items()},
        )
    x, context = given[0]
    x = x.detach().requires_grad_()
    output_gradient = torch.ones_like(x)
    ops = LargeOps(x.numel())
    with ops, patch.object(KernelOp, "__call__", lambda op, *arguments: ops.call_kernel(op, *arguments)):
        real(model, x, context).backward(output_gradient)
    assert x.grad is not None and model.blocks[0].attn.qkv.bias.grad is not None
    return ops


@pytest.mark.parametrize("given_frames", [False, True], ids=["all noised", "given frames"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_only_kernels_and_matrix_products_touch_all_tokens(device, no_launch, dtype, given_frames) -> None:
    ops = run_two_blocks("triton", device, dtype, given_frames)
    assert ops.found == PLAIN
    forward = {
        *("modulated_norm", "spatial_attention", "gate_residual_modulated_norm", "temporal_attention"),
        *("gate_residual", "cross_attention", "gelu_tanh"),
    }
    assert ops.kernels == forward | {f"{op}_backward" for op in forward}


def test_quack_reads_and_writes_operands_where_they_lie(device, no_launch, monkeypatch) -> None:
    stand_in = install(monkeypatch, QuackStandIn())
    monkeypatch.setattr("opensora_fast.replace.load_quack", lambda: stand_in)
    ops = run_two_blocks("triton", device, linear="quack")
    # The stand-in computes GELU by PyTorch's; the gradient of fc1's bias is a sum of its own, too.
    found = {name: count for name, count in ops.found.items() if "gelu" not in name}
    assert found == PLAIN | {"aten::sum.dim_IntList": 2 + 2}
    assert {"quack_product", "quack_gelu", "quack_gelu_backward"} <= ops.kernels and "gelu_tanh" not in ops.kernels
    # Eight Linears a block: forward once to find what the blocks get, then forward and backward.
    assert len(stand_in.called) == 2 * 8 * 3


def test_plain_pytorch_is_noticed(device) -> None:
    ops = run_two_blocks("reference", device)
    assert ops.kernels == set() and {"aten::gelu", "aten::native_layer_norm"} & set(ops.found)


def test_plain_pytorch_within_an_op_is_noticed(device, no_launch, monkeypatch) -> None:
    module = importlib.import_module("opensora_fast.kernels.spatial_attention")
    monkeypatch.setattr(module, "contiguous", lambda *tensors: [tensor.clone() for tensor in tensors])
    assert run_two_blocks("triton", device).found["aten::clone"] >= 2
