"""The measuring stick: limits follow eager's error, zero gradients have a scale, nothing missing or broken passes."""

import math

import pytest
import torch

from opensora_fast.benchmarks.accuracy import FLOOR_IN_EPS, GRADIENT_FACTOR, OUTPUT_FACTOR, Yardstick, distance

EXACT = {"output": torch.tensor([3.0, 4.0]).double(), "gradient of q": torch.tensor([0.0, 10.0]).double()}


def off_by(error: float) -> dict[str, torch.Tensor]:
    """Results whose relative error is `error`."""
    return {name: (value * (1 + error)).float() for name, value in EXACT.items()}


def test_limits_are_multiples_of_eagers_error_and_a_few_eps():
    stick = Yardstick.measure(EXACT, off_by(1e-3), torch.float32, sent_back=1.0)
    floor = FLOOR_IN_EPS[torch.float32] * torch.finfo(torch.float32).eps
    assert stick.limits["output"] == pytest.approx(OUTPUT_FACTOR * 1e-3 + floor, rel=1e-3)
    assert stick.limits["gradient of q"] == pytest.approx(GRADIENT_FACTOR * 1e-3 + floor, rel=1e-3)


@pytest.mark.parametrize(("error", "right"), [(1.9e-3, True), (2.1e-3, False)])
def test_an_output_may_err_twice_as_much_as_eager(error, right):
    stick = Yardstick.measure(EXACT, off_by(1e-3), torch.float32, sent_back=1.0)
    results = off_by(0.0) | {"output": off_by(error)["output"]}
    assert stick.judge(results).is_right is right
    assert stick.judge(results).name == "output"


def test_outputs_alone_leave_gradients_out():
    stick = Yardstick.measure(EXACT, off_by(0.0), torch.float32, sent_back=1.0)
    results = off_by(0.0) | {"gradient of q": torch.zeros(2)}
    assert not stick.judge(results).is_right
    assert stick.judge(results, outputs_only=True).is_right


@pytest.mark.parametrize(
    "broken",
    [None, torch.tensor([math.nan, 10.0]), torch.tensor([math.inf, 10.0]), torch.zeros(3)],
    ids=["missing", "nan", "inf", "shape"],
)
def test_what_is_missing_or_broken_is_infinitely_wrong(broken):
    stick = Yardstick.measure(EXACT, off_by(1e-3), torch.float32, sent_back=1.0)
    judgement = stick.judge(off_by(0.0) | {"gradient of q": broken})
    assert judgement.error == math.inf and not judgement.is_right


def test_a_gradient_that_is_exactly_zero_is_measured_by_what_was_sent_back():
    exact = {"output": torch.ones(2).double(), "gradient of q": torch.full((2,), 1e-18).double()}
    eager = {"output": torch.ones(2), "gradient of q": torch.full((2,), 1e-8)}
    stick = Yardstick.measure(exact, eager, torch.float32, sent_back=10.0)
    assert stick.judge(eager).is_right
    assert stick.judge(eager | {"gradient of q": torch.full((2,), 2e-8)}).is_right
    wrong = stick.judge(eager | {"gradient of q": torch.full((2,), 1e-3)})
    assert not wrong.is_right and wrong.error == pytest.approx(2**0.5 * 1e-3 / 10)


def test_two_eager_versions_give_the_larger_limit():
    strict, loose = (Yardstick.measure(EXACT, off_by(error), torch.float32, 1.0) for error in (1e-4, 1e-3))
    assert strict.loosened(loose).limits == loose.limits == loose.loosened(strict).limits


def test_several_tensors_count_as_one_vector():
    assert distance([torch.zeros(1), torch.zeros(1)], [torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0
    assert distance([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]) == math.inf
