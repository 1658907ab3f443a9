"""The measuring stick: limits follow eager's error, zero gradients have a scale, nothing missing or broken passes."""

import math

import pytest
import torch

from opensora_fast.benchmarks.measuring.accuracy import Yardstick, distance

ONE = torch.ones(1)
EXACT = {"output": torch.tensor([3.0, 4.0]).double(), "gradient of q": torch.tensor([0.0, 10.0]).double()}


def off_by(error: float) -> dict[str, torch.Tensor]:
    """Results whose relative error is `error`."""
    return {name: (value * (1 + error)).float() for name, value in EXACT.items()}


@pytest.mark.parametrize(("dtype", "floor_in_eps"), [(torch.float32, 4), (torch.float16, 0.5), (torch.bfloat16, 0.5)])
def test_limits_are_multiples_of_eagers_error_and_a_few_eps(dtype, floor_in_eps):
    eager = {name: value * (1 + 1e-5) for name, value in EXACT.items()}
    stick = Yardstick.measure(EXACT, eager, dtype, sent_back=1.0)
    floor = floor_in_eps * torch.finfo(dtype).eps
    assert stick.limits == pytest.approx({"output": 2 * 1e-5 + floor, "gradient of q": 3 * 1e-5 + floor})


@pytest.mark.parametrize(
    ("name", "error", "right"),
    [
        ("output", 1.9e-3, True),
        ("output", 2.1e-3, False),
        ("gradient of q", 2.9e-3, True),
        ("gradient of q", 3.1e-3, False),
    ],
)
def test_an_output_may_err_twice_and_a_gradient_three_times_as_much_as_eager(name, error, right):
    stick = Yardstick.measure(EXACT, off_by(1e-3), torch.float32, sent_back=1.0)
    judgement = stick.judge(off_by(0.0) | {name: off_by(error)[name]})
    assert (judgement.name, judgement.is_right) == (name, right)


@pytest.mark.parametrize(("error", "right"), [(3.9e-3, True), (4.1e-3, False)])
def test_beside_eager_an_output_may_err_twice_as_much_again(error, right):
    """Where nobody knows the exact result: eager's own error may lie on the other side of it."""
    stick = Yardstick.measure(EXACT, off_by(1e-3), torch.float32, sent_back=1.0)
    results = off_by(0.0) | {"output": off_by(error)["output"]}
    assert stick.judge_against_eager(results, off_by(0.0), sent_back=1.0).is_right is right


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


@pytest.mark.parametrize(
    ("name", "share", "own_size"),
    [("gradient of q", 0.9e-9, False), ("gradient of q", 1.1e-9, True), ("output", 0.9e-9, True)],
)
@pytest.mark.parametrize("sent_back", [1e-3, 1e3])
def test_a_small_result_is_measured_by_its_own_size(name, share, own_size, sent_back):
    """Only a gradient below a billionth of what was sent back is zero but for rounding."""
    exact = {name: torch.tensor([share * sent_back]).double()}
    stick = Yardstick.measure(exact, exact, torch.float32, sent_back)
    twice = stick.judge({name: 2 * exact[name]})
    assert twice.error == pytest.approx(1.0 if own_size else share) and twice.is_right is not own_size


def test_two_eager_versions_give_the_larger_limit():
    strict, loose = (Yardstick.measure(EXACT, off_by(error), torch.float32, 1.0) for error in (1e-4, 1e-3))
    assert strict.loosened(loose).limits == loose.limits == loose.loosened(strict).limits


def test_several_tensors_count_as_one_vector():
    assert distance([torch.zeros(1), torch.zeros(1)], [torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0
    assert distance([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]) == math.inf


LAYERS = {"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([0.0, 10.0]), "third": torch.ones(4), "last": ONE}


def layers_off_by(**errors):
    return {name: value * (1 + errors.get(name, 0.0)) for name, value in LAYERS.items()}


def stick_of_layers(**eager_errors):
    exact = {"gradient of the parameters": {name: value.double() for name, value in LAYERS.items()}}
    eager = {"gradient of the parameters": layers_off_by(**eager_errors)}
    return Yardstick.measure(exact, eager, torch.float32, sent_back=1.0)


def test_tensors_with_names_count_as_one_vector():
    assert distance(layers_off_by(first=1.0, second=1.0), LAYERS) == pytest.approx(math.sqrt(125))


def test_a_wrong_result_of_several_tensors_names_those_that_err_most():
    stick = stick_of_layers(first=0.01, second=0.02)
    judgement = stick.judge({"gradient of the parameters": layers_off_by(first=0.4, second=0.1, third=0.5, last=0.1)})
    assert not judgement.is_right
    assert [part.name for part in judgement.parts] == ["first", "second", "third"]  # at most three
    squares = [(0.4 * 5) ** 2, (0.1 * 10) ** 2, (0.5 * 2) ** 2, 0.1**2]
    assert [part.share for part in judgement.parts] == pytest.approx([square / sum(squares) for square in squares[:3]])
    assert [part.error for part in judgement.parts] == pytest.approx([0.4, 0.1, 0.5])
    assert [part.eager_error for part in judgement.parts] == pytest.approx([0.01, 0.02, 0.0], rel=1e-3)
    assert str(judgement.parts[0]) == "first (67%; error 0.4, eager's 0.01)"


SIZES = {"large": 1.0, "small": 1e-4, "noise": 1e-4, "nothing": 1e-14}  # eager errs by all of the third


def gradients(**errors):
    """Of parameters, with what is added to each in sizes of its own."""
    return {
        "output": ONE,
        "gradient of the parameters": {
            name: torch.full((4,), size, dtype=torch.float64) * (1 + errors.get(name, 0.0))
            for name, size in SIZES.items()
        },
    }


def stick_of_gradients():
    eager = gradients(large=0.01, small=0.02, noise=1.0, nothing=1e3)
    return Yardstick.measure(gradients(), eager, torch.bfloat16, sent_back=1.0)


@pytest.mark.parametrize("name", ["large", "small"])
def test_the_gradient_of_a_parameter_may_not_be_zero_however_small_it_is_beside_the_others(name):
    judgement = stick_of_gradients().judge(gradients(**{name: -1.0}))
    expected = "gradient of the parameters" if name == "large" else "gradient of the parameters (small alone)"
    assert (judgement.name, judgement.is_right) == (expected, False)
    assert judgement.error == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("times", "right"), [(9.9, True), (10.5, False)])
def test_a_gradient_alone_may_err_ten_times_as_much_as_eager(times, right):
    stick = stick_of_gradients()
    assert stick.judge(gradients(small=times * 0.02)).is_right is right
    beside_eager = stick.judge_against_eager(gradients(small=2 * times * 0.02), gradients(), 1.0)
    assert beside_eager.is_right is right
    assert stick.judge(gradients(small=times * 0.02), outputs_only=True).is_right


def test_a_gradient_that_is_noise_to_eager_may_be_noise():
    """Exactly zero or not; of what has no size, the noise is taken relative to what was sent back."""
    stick = stick_of_gradients()
    assert stick.judge(gradients(noise=-3.0, nothing=1e9)).is_right
    wrong = stick.judge(gradients(nothing=1e12))
    assert (wrong.name, wrong.is_right) == ("gradient of the parameters (nothing alone)", False)
    assert wrong.error == pytest.approx(0.02, rel=1e-3)


def test_a_right_result_is_told_by_its_worst_as_a_whole():
    judgement = stick_of_gradients().judge(gradients(small=0.19))
    assert judgement.is_right and judgement.name in ("output", "gradient of the parameters")


def test_the_larger_of_two_eager_errors_is_told():
    loosened = stick_of_layers(first=0.01).loosened(stick_of_layers(first=0.02, second=0.01))
    (first, *_) = loosened.judge({"gradient of the parameters": layers_off_by(first=9.0)}).parts
    assert (first.name, first.eager_error) == ("first", pytest.approx(0.02, rel=1e-3))


def test_tensors_that_are_not_finite_are_to_blame():
    broken = layers_off_by(first=9.0) | {"last": torch.tensor([math.nan]), "third": torch.ones(5)}
    parts = stick_of_layers().judge({"gradient of the parameters": broken}).parts
    assert [(part.name, part.share, part.error) for part in parts[:2]] == [
        ("third", 0.5, math.inf),
        ("last", 0.5, math.inf),
    ]
    assert parts[2].share == 0.0
    assert stick_of_layers().judge({"gradient of the parameters": None}).error == math.inf


def test_larger_inputs_may_have_more_tensors_than_eager_was_measured_on():
    stick = Yardstick.measure({"output": [ONE.double()]}, {"output": [ONE]}, torch.float32, sent_back=0.0)
    judgement = stick.judge_against_eager({"output": [ONE, 2 * ONE]}, {"output": [ONE, ONE]}, 0.0)
    assert [(part.name, part.share) for part in judgement.parts] == [("1", 1.0), ("0", 0.0)]
    assert all(math.isnan(part.eager_error) for part in judgement.parts)


def test_right_results_and_those_of_one_tensor_name_nothing():
    assert stick_of_layers().judge({"gradient of the parameters": layers_off_by()}).parts == ()
    stick = Yardstick.measure({"output": ONE.double()} | {"gradient of q": None}, {"output": ONE}, torch.float32, 1.0)
    unexpected = stick.judge({"output": ONE, "gradient of q": ONE})
    assert (unexpected.name, unexpected.error, unexpected.parts) == ("gradient of q", math.inf, ())
    assert stick.judge({"output": [2 * ONE], "gradient of q": None}).parts == ()
