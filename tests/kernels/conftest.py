"""What the kernel tests share: poisoned allocations, and the one place that says how accurate a kernel must be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# A kernel may err this many times as much as eager PyTorch in the same dtype, both against float64.
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# Errors below this many eps of the tensor's own dtype always pass, relative to the RMS (for the RMS error) or to the
# largest value (for the largest error): half an eps is the rounding of the result itself, which eager may escape by
# luck; in float32 the order of a sum decides over a few eps.
FLOOR_IN_EPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 4.0}


@pytest.fixture(
    params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "float16", "bfloat16"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """float32 and float16 anywhere; bfloat16 on a GPU only, as Triton's interpreter computes it wrongly."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def use_interpreter(interpreter: None) -> None:
    pass


# What `with torch.device(…)` applies to is kept from its first use on, which must not be while `poison` is in force.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialized memory with NaN (or the largest integer), so that an element nobody writes shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*arguments: object, **keywords: object) -> Tensor:
            tensor = allocate(*arguments, **keywords)
            with torch.no_grad():
                if tensor.dtype == torch.bool:
                    return tensor
                if tensor.is_floating_point():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


def _check(name: str, ours: Tensor, eager: Tensor, exact: Tensor, factor: float) -> None:
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager has {eager.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    if not exact.numel():
        return
    floor = FLOOR_IN_EPS[ours.dtype] * torch.finfo(ours.dtype).eps
    ours_error, eager_error = (tensor.double() - exact for tensor in (ours, eager))
    for kind, measure in (("RMS", lambda tensor: tensor.square().mean().sqrt()), ("largest", lambda t: t.abs().max())):
        error, limit = measure(ours_error), factor * measure(eager_error) + floor * measure(exact)
        assert error <= limit, (
            f"{name}: {kind} error {error:.3e} is over {limit:.3e} "
            f"({factor:g} × eager's {measure(eager_error):.3e} + {floor:.1e} × {measure(exact):.3e})"
        )


@pytest.fixture(scope="session")
def assert_as_accurate_as_eager() -> Callable[[str, Tensor, Tensor, Tensor, float], None]:
    """`assert_as_accurate_as_eager(name, ours, eager_same_dtype, exact_fp64, factor)`.

    Both the RMS and the largest error must be at most `factor` × eager's plus the floor; shape and dtype must agree and
    every value must be finite.
    """
    return _check


@pytest.fixture(scope="session")
def compare_with_eager() -> Callable[..., None]:
    """`compare_with_eager(ours, reference, inputs, expanded_gradient=False)`: outputs and gradients against float64.

    `ours` and `reference` take `inputs` (tensors or None) as keyword arguments and return a tensor or a tuple. Inputs
    keep their strides. A gradient is compared for each input that requires one. `expanded_gradient` sends back ones of
    stride 0, as `output.sum().backward()` does; otherwise gradients are random.
    """

    def run(
        function: Callable, inputs: dict[str, Tensor | None], gradients: list[Tensor] | None, wide: bool
    ) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        leaves = {}
        for name, tensor in inputs.items():
            if isinstance(tensor, Tensor):
                leaf = tensor.detach().double() if wide and tensor.is_floating_point() else tensor.detach()
                tensor = leaf.requires_grad_(tensor.requires_grad)
            leaves[name] = tensor
        outputs = function(**leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if gradients is not None and any(output.requires_grad for output in outputs):
            torch.autograd.backward(
                outputs, [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients, strict=True)]
            )
        return outputs, {
            name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad
        }

    def compare(
        ours: Callable,
        reference: Callable,
        inputs: dict[str, Tensor | None],
        *,
        expanded_gradient: bool = False,
        gradient_factor: float = GRADIENT_FACTOR,
    ) -> None:
        shapes = [output.detach() for output in run(reference, inputs, None, wide=False)[0]]
        generator = torch.Generator().manual_seed(1)
        if expanded_gradient:
            gradients = [output.new_ones(()).expand_as(output) for output in shapes]
        else:
            gradients = [
                torch.randn(output.shape, generator=generator).to(output.device, output.dtype) for output in shapes
            ]
        exact, exact_gradients = run(reference, inputs, gradients, wide=True)
        eager, eager_gradients = run(reference, inputs, gradients, wide=False)
        mine, my_gradients = run(ours, inputs, gradients, wide=False)
        for index, (output, eager_output, exact_output) in enumerate(zip(mine, eager, exact, strict=True)):
            _check(f"output {index}", output.detach(), eager_output.detach(), exact_output.detach(), OUTPUT_FACTOR)
        for name, exact_gradient in exact_gradients.items():
            gradient = my_gradients[name]
            assert gradient is not None, f"gradient of {name}: missing"
            _check(f"gradient of {name}", gradient, eager_gradients[name], exact_gradient, gradient_factor)

    return compare
