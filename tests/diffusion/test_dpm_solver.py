"""DPM-Solver++(2M) against the exact solution for Gaussian data."""

import pytest
import torch

from opensora_fast.diffusion import DPMSolver

from .toys import ToyModel, ToyTextEncoder

MEAN, SPREAD = 2.0, 0.5
LOG_ALPHA = 0.5 * torch.cumsum(torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), 0)


def exact_model(x, timestep, **conditioning):
    """The noise prediction for data N(MEAN, SPREAD^2), at fractional timesteps."""
    below = timestep.double().floor().long().clamp(0, 998)
    log_alpha = LOG_ALPHA[below] + (timestep - below) * (LOG_ALPHA[below + 1] - LOG_ALPHA[below])
    alpha = log_alpha.exp().view(-1, 1, 1, 1, 1)
    variance = 1 - alpha**2
    return variance.sqrt() * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + variance)


def flow_end(z):
    """Where the probability flow carries z: each quantile of the noise to the same quantile of the least noisy step."""

    def mean_and_spread(log_alpha):
        alpha = log_alpha.exp()
        return alpha * MEAN, (alpha**2 * SPREAD**2 + 1 - alpha**2).sqrt()

    (start_mean, start_spread), (end_mean, end_spread) = mean_and_spread(LOG_ALPHA[-1]), mean_and_spread(LOG_ALPHA[0])
    return end_mean + end_spread * (z - start_mean) / start_spread


def solve(steps, z):
    solver = DPMSolver(steps, cfg_scale=1.0)
    return solver.sample(exact_model, ToyTextEncoder(1), z, ["a"], "cpu", progress=False)


def test_it_converges_to_the_probability_flow_at_second_order():
    z = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [(solve(steps, z) - flow_end(z)).abs().max().item() for steps in (50, 100, 200)]
    assert errors[0] < 0.1
    for error, half_as_wide in zip(errors, errors[1:], strict=False):
        assert half_as_wide == pytest.approx(error / 4, rel=0.15)


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_few_steps_stay_bounded(steps):
    z = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert solve(steps, z).abs().max() < 10


@pytest.mark.parametrize(("steps", "is_first_order"), [(2, True), (9, True), (10, False)])
def test_only_the_last_of_few_steps_is_of_first_order(steps, is_first_order):
    calls = []

    def model(x, timestep, **conditioning):
        noise = exact_model(x, timestep)
        calls.append((x[:1], noise[:1]))
        return noise

    z = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = DPMSolver(steps, cfg_scale=1.0)
    out = solver.sample(model, ToyTextEncoder(1), z, ["a"], "cpu", progress=False)

    def first_order(step):
        """From `step` to the next by the prediction there alone, as DDIM."""
        x, noise = calls[step]
        x_start = (x - solver.sigmas[step] * noise) / solver.alphas[step]
        return solver.alphas[step + 1] * x_start + solver.sigmas[step + 1] * noise

    assert torch.allclose(out, first_order(steps - 1)) == is_first_order
    assert all(not torch.allclose(calls[step + 1][0], first_order(step)) for step in range(1, steps - 1))


def test_the_model_is_called_once_a_step_from_noise_to_data(toy_model):
    DPMSolver(5).sample(toy_model, ToyTextEncoder(1), torch.zeros(1, 4, 1, 1, 1), ["a"], "cpu", progress=False)
    times = [call["timestep"][0].item() for call in toy_model.calls]
    assert times == pytest.approx([999.0, 799.2, 599.4, 399.6, 199.8], abs=1e-3)


def test_given_frames_and_too_few_steps_are_refused():
    arguments = (ToyModel(), ToyTextEncoder(1), torch.zeros(1, 4, 2, 1, 1), ["a"], "cpu")
    with pytest.raises(ValueError, match='use scheduler type "iddpm"'):
        DPMSolver(3).sample(*arguments, mask=torch.tensor([[1.0, 0.0]]))
    DPMSolver(3).sample(*arguments, mask=torch.ones(1, 2), progress=False)
    with pytest.raises(ValueError, match="z has 1 rows for 0 prompts"):
        DPMSolver(3).sample(*arguments[:3], [], "cpu")
    with pytest.raises(ValueError, match="at least 2"):
        DPMSolver(1)
