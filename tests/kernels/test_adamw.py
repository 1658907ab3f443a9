"""One step of the optimizer against AdamW written out in float64, for both implementations."""

import math

import pytest
import torch

from opensora_fast.kernels import adamw

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.9
BACKENDS = ["reference", "triton"]


def make_state(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    master, average = (torch.randn(size, generator=generator) for _ in range(2))
    state = {
        "step": torch.zeros(()),
        "master": master,
        "first_moment": torch.zeros(size),
        "second_moment": torch.zeros(size),
        "working": master.to(dtype),
        "average": average,
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


def make_gradient(step: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(100 + step)).to(device, dtype)
    return gradient, torch.linalg.vector_norm(gradient, dtype=torch.float32)


def step_in_float64(state: dict, gradient: torch.Tensor, norm: torch.Tensor, max_norm: float | None) -> None:
    state["step"] += 1
    gradient = gradient.double()
    if max_norm is not None:
        gradient = gradient * min(1.0, max_norm / (float(norm) + 1e-6))
    for name, beta, power in (("first_moment", BETAS[0], 1), ("second_moment", BETAS[1], 2)):
        state[name] = beta * state[name] + (1 - beta) * gradient**power
    first = state["first_moment"] / (1 - BETAS[0] ** float(state["step"]))
    second = state["second_moment"] / (1 - BETAS[1] ** float(state["step"]))
    state["master"] = state["master"] - LR * first / (second.sqrt() + EPS)
    state["average"] = DECAY * state["average"] + (1 - DECAY) * state["master"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 1000, 1024, 3080])
def test_steps_equal_adamw_in_float64(backend, max_norm, size, dtype, device) -> None:
    state = make_state(size, dtype, device)
    exact = {name: tensor.double() for name, tensor in state.items() if name != "working"}
    for step in range(4):
        gradient, norm = make_gradient(step, size, dtype, device)
        options = {"lr": LR, "betas": BETAS, "eps": EPS, "max_norm": max_norm, "decay": DECAY}
        adamw(gradient, norm, **state, **options, backend=backend)
        step_in_float64(exact, gradient, norm, max_norm)
        assert float(state["step"]) == step + 1
        for name, tensor in exact.items():
            # float32 rounds weights up to 4 by 2.4e-7, a twenty-thousandth of a step.
            atol = 5e-7 if name in ("master", "average") else 1e-7
            # On a GPU torch's own step rounds β₂ = 0.999 to float32 before it takes it from 1.
            rtol = 2e-5 if backend == "reference" and device.type == "cuda" else 2e-6
            torch.testing.assert_close(
                state[name].double(), tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert torch.equal(state["working"], state["master"].to(dtype))


def test_the_first_step_is_as_long_as_the_learning_rate(device) -> None:
    """To the last digits, which weights of zero do not round away: 1 - β₂ᵗ is a small difference in the first steps."""
    state = {name: torch.zeros(4, device=device) for name in ("master", "first_moment", "second_moment")}
    norm, step = torch.tensor(2.0, device=device), torch.zeros((), device=device)
    adamw(torch.ones(4, device=device), norm, step, **state, lr=LR, backend="triton")
    torch.testing.assert_close(state["master"], torch.full((4,), -LR, device=device), rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_working_weights_and_average_may_be_left_out(backend, device) -> None:
    state, whole = make_state(1000, torch.float32, device), make_state(1000, torch.float32, device)
    gradient, norm = make_gradient(0, 1000, torch.float32, device)
    adamw(gradient, norm, **whole, lr=LR, backend=backend)
    del state["working"], state["average"]
    adamw(gradient, norm, **state, lr=LR, backend=backend)
    for name, tensor in state.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(backend, bad, device) -> None:
    state = make_state(1000, torch.bfloat16, device)
    gradient, norm = make_gradient(0, 1000, torch.bfloat16, device)
    adamw(gradient, norm, **state, lr=LR, decay=DECAY, backend=backend)
    before = {name: tensor.clone() for name, tensor in state.items()}
    gradient[3] = bad
    adamw(gradient, torch.full_like(norm, bad), **state, lr=LR, decay=DECAY, max_norm=1.0, backend=backend)
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_gradient_is_read_as_it_stands(backend, device) -> None:
    state, other = make_state(1000, torch.float32, device), make_state(1000, torch.float32, device)
    gradient, norm = make_gradient(0, 1000, torch.float32, device)
    wide = torch.stack([gradient, -gradient], dim=1)
    adamw(gradient, norm, **state, lr=LR, backend=backend)
    adamw(wide[:, 0], norm, **other, lr=LR, backend=backend)
    assert torch.equal(state["master"], other["master"])
    assert torch.equal(wide[:, 1], -gradient) and torch.equal(wide[:, 0], gradient)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"master": torch.zeros(5)}, r"adamw: master has shape \(5,\), expected \(4\)"),
        ({"average": torch.zeros(4, dtype=torch.float64)}, "adamw: average is torch.float64, expected torch.float32"),
        ({"norm": torch.zeros(1)}, r"adamw: norm has shape \(1,\), expected \(\)"),
        ({"first_moment": torch.zeros(8)[::2]}, r"adamw: first_moment has strides \(2,\), but it must be contiguous"),
        ({"gradient": torch.zeros(2, 2)}, r"adamw: gradient has shape \(2, 2\), expected \(any\)"),
        ({"gradient": None}, "adamw: gradient must be a tensor, got NoneType"),
        ({"working": torch.zeros(4, dtype=torch.int32)}, "adamw: working has dtype torch.int32"),
        ({"backend": "cuda"}, "adamw: backend 'cuda' is unknown"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message) -> None:
    names = ("gradient", "master", "first_moment", "second_moment", "working", "average")
    arguments = {name: torch.zeros(4) for name in names} | {"norm": torch.zeros(()), "step": torch.zeros(())}
    with pytest.raises(ValueError, match=message):
        adamw(**(arguments | changes), lr=LR)
