"""What a block computes between its matrix products when every op is a kernel: nothing else of full size."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast import STDiT2, STDiT2Config, use_kernels

pytestmark = pytest.mark.usefixtures("interpreter")

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class LargeOps(TorchDispatchMode):
    """Collects ops of PyTorch, other than views and matrix products, that read or write at least `size` numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: Counter[str] = Counter()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [item for item in (*arguments, result) if isinstance(item, torch.Tensor)]
        if function.namespace == "opensora_fast":
            self.kernels.add(function.name().split("::")[1])
        elif not function.is_view and function not in PRODUCTS:
            if any(tensor.numel() >= self.size for tensor in tensors):
                self.found[function.name()] += 1
        return result


def run_two_blocks(backend: str, monkeypatch) -> LargeOps:
    """Two blocks forward and backward; the first makes the norm of the second."""
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config.small(depth=2, caption_channels=32, model_max_length=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    use_kernels(model, backend=backend)
    given = []
    real = STDiT2._run_blocks
    monkeypatch.setattr(STDiT2, "_run_blocks", lambda self, *given_: given.append(given_) or real(self, *given_))
    sizes = {name: torch.full((2,), value) for name, value in {"height": 64.0, "width": 64.0, "ar": 1.0}.items()}
    x, timestep, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 1, 8, 32)
    model(x, timestep, y, num_frames=torch.full((2,), 4.0), fps=torch.full((2,), 24.0), **sizes)
    x, context = given[0]
    x = x.detach().requires_grad_()
    output_gradient = torch.ones_like(x)
    with LargeOps(x.numel()) as ops:
        real(model, x, context).backward(output_gradient)
    assert x.grad is not None and model.blocks[0].attn.qkv.bias.grad is not None
    return ops


def test_only_kernels_and_matrix_products_touch_all_tokens(monkeypatch) -> None:
    ops = run_two_blocks("triton", monkeypatch)
    # Once a step, where the stream enters: the first block's norm is an op of its own, beside the residual connection.
    assert ops.found == {"aten::add.Tensor": 1}
    forward = {
        *("modulated_norm", "spatial_attention", "gate_residual_modulated_norm", "temporal_attention"),
        *("gate_residual", "cross_attention", "gelu_tanh"),
    }
    assert ops.kernels == forward | {f"{op}_backward" for op in forward}


def test_plain_pytorch_is_noticed(monkeypatch) -> None:
    ops = run_two_blocks("reference", monkeypatch)
    assert ops.kernels == set() and {"aten::gelu", "aten::native_layer_norm"} & set(ops.found)
