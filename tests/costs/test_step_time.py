"""Times are counted, or fitted to measured steps; a fit finds the numbers that the steps were made with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.shapes import VIDEO_SIZES, fill
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.idle import idle_share, slowest_of_each_step
from opensora_fast.costs.operations import Count, count_training_step
from opensora_fast.costs.step_time import FEWEST_ROWS, MeasuredStep, StepTime, fit_step_time

H200 = DATASHEETS["H200"]
XL = STDiT2Config.xl_2()
WORKLOADS = [fill(name, frames, tokens) for name in VIDEO_SIZES for frames, tokens in ((16, 9_000), (64, 50_000))]
COUNTS = [count_training_step(XL, workload, 120, 767.5e6) for workload in WORKLOADS]


def make_steps(truth: StepTime, noise: float = 0.0, counts=COUNTS) -> list[MeasuredStep]:
    draw = np.random.default_rng(0)
    return [
        MeasuredStep(f"step {index}", count, truth.seconds(count) * (1 + noise * draw.uniform(-1, 1)))
        for index, count in enumerate(counts)
    ]


def test_without_rows_it_is_the_limit_of_the_datasheet_and_says_so():
    time = StepTime(H200)
    assert time.seconds(COUNTS[0]) == pytest.approx(COUNTS[0].seconds(H200))
    assert time.basis == "counted, not measured"


@given(st.floats(1.0, 3.0), st.floats(0.5, 3.0), st.floats(0.0, 0.05))
def test_a_fit_finds_what_the_steps_were_made_with(matrix, bandwidth, constant):
    time = fit_step_time(H200, make_steps(StepTime(H200, matrix, bandwidth, constant)))
    assert time.matrix == pytest.approx(matrix, rel=1e-4)
    assert time.bandwidth == pytest.approx(bandwidth, rel=1e-4)
    assert time.constant == pytest.approx(constant, abs=1e-6)
    assert time.worst_residual < 1e-6


def test_noise_of_three_percent_moves_predictions_by_less_and_is_told():
    truth = StepTime(H200, 1.4, 1.2, 0.004)
    time = fit_step_time(H200, make_steps(truth, noise=0.03))
    other = count_training_step(XL, fill("360p", 32, 30_000), 120, 767.5e6)
    assert time.seconds(other) == pytest.approx(truth.seconds(other), rel=0.03)
    assert 0.005 < time.worst_residual < 0.06
    assert time.basis == f"fitted to 10 rows of H200, worst residual {100 * time.worst_residual:.1f} %"


def test_no_number_is_negative_where_plain_least_squares_would_make_one():
    """Times that grow faster than the work: without the condition the constant would be negative."""
    steps = [
        MeasuredStep("", Count(scale * 1e15, scale * extra * 1e12), scale**1.2)
        for scale, extra in ((1, 1.0), (2, 1.3), (3, 0.9), (4, 1.1), (6, 1.2), (8, 0.8))
    ]
    time = fit_step_time(H200, steps)
    assert min(time.matrix, time.bandwidth, time.constant) == 0
    assert time.matrix > 0 or time.bandwidth > 0


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=f"5 measured training steps of H200 are too few .* {FEWEST_ROWS}.*bench"):
        fit_step_time(H200, make_steps(StepTime(H200))[:5])


def test_steps_of_one_shape_are_refused():
    with pytest.raises(ValueError, match="too alike for a fit: it takes other lengths"):
        fit_step_time(H200, make_steps(StepTime(H200), counts=[COUNTS[0]] * 8))


def test_every_step_waits_for_its_slowest_process():
    costs = np.array([1.0, 3.0, 2.0, 2.0, 9.0])
    assert slowest_of_each_step(costs, 2).tolist() == [3.0, 2.0]
    assert idle_share(costs, 2) == pytest.approx(1 - 8 / 10)
    assert idle_share(costs, 1) == 0
    with pytest.raises(ValueError, match="5 micro-batches do not fill one step of 6 processes"):
        idle_share(costs, 6)
