"""iddpm-speed: its distribution of timesteps, and the weights of its loss."""

import pytest
import torch

from opensora_fast.diffusion import IDDPM, SpeeDiffusion


def test_distribution_weights_and_meaningful_steps_equal_the_golden_file(golden):
    expected = golden("iddpm_speed")
    speed = SpeeDiffusion()
    assert speed.meaningful_steps == expected["meaningful_steps"].item()
    torch.testing.assert_close(speed.p, expected["p"], rtol=0, atol=1e-7)
    torch.testing.assert_close(speed.weights, expected["weights"], rtol=1e-6, atol=0)


def test_steps_are_drawn_by_the_distribution_and_then_mirrored():
    speed = SpeeDiffusion()
    steps = speed.draw_timesteps(200_000, torch.Generator().manual_seed(0))
    drawn, mirrored = steps[:100_001], steps[100_001:]
    frequency = torch.bincount(drawn, minlength=1000) / len(drawn)
    for low, high in ((0, 300), (300, 600), (600, 700), (700, 1000)):
        assert frequency[low:high].sum().item() == pytest.approx(speed.p[low:high].sum().item(), abs=0.01)
    expected = torch.where(drawn < 700, 700 - drawn, drawn - 700)
    assert torch.equal(mirrored, expected[: len(mirrored)])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options", [{}, {"num_sampling_steps": 2}, {"num_sampling_steps": 50}, {"diffusion_steps": 80}]
)
def test_any_number_of_steps_is_drawn_and_within_range(count, options):
    speed = SpeeDiffusion(**options)
    for seed in range(20):
        steps = speed.draw_timesteps(count, torch.Generator().manual_seed(seed))
        assert steps.shape == (count,) and steps.dtype == torch.int64
        assert 0 <= steps.min() and steps.max() < speed.num_timesteps
    assert speed.p.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_mirror_image_stays_within_range_where_only_the_last_step_is_flat():
    speed = SpeeDiffusion(num_sampling_steps=20)
    assert speed.meaningful_steps == speed.num_timesteps == 20
    steps = speed.draw_timesteps(1000, torch.Generator().manual_seed(0))
    assert 0 in steps[:501] and steps.max() == 19


def test_it_takes_the_arguments_of_iddpm():
    arguments = {
        "timestep_respacing": "10,20",
        "noise_schedule": "squaredcos_cap_v2",
        "use_kl": True,
        "sigma_small": True,
        "predict_xstart": True,
        "learn_sigma": False,
        "rescale_learned_sigmas": True,
        "diffusion_steps": 500,
        "cfg_scale": 2.0,
    }
    speed, plain = SpeeDiffusion(**arguments), IDDPM(**arguments)
    assert speed.timestep_map == plain.timestep_map and torch.equal(speed.betas, plain.betas)
    for name in vars(plain).keys() & arguments.keys():
        assert getattr(speed, name) == arguments[name], name


def test_training_ignores_t_and_weighs_the_squared_error():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 2, 3, 3, generator=generator)
    output = torch.randn(3, 8, 2, 3, 3, generator=generator)
    seen = []

    def model(x_t, timestep):
        seen.append(timestep)
        return output

    speed = SpeeDiffusion()
    mask = torch.tensor([[True, False]] * 3)
    losses = speed.training_losses(model, x, None, noise=noise, mask=mask, generator=torch.Generator().manual_seed(4))
    t = speed.draw_timesteps(3, torch.Generator().manual_seed(4))
    assert torch.equal(seen[0], t)
    plain = IDDPM().training_losses(model, x, t, {}, noise, mask)
    torch.testing.assert_close(losses["mse"], plain["mse"] * speed.weights[t])
    torch.testing.assert_close(losses["vb"], plain["vb"])
    again = speed.training_losses(
        model, x, torch.zeros(3, dtype=torch.int64), noise=noise, mask=mask, generator=torch.Generator().manual_seed(4)
    )
    assert torch.equal(again["loss"], losses["loss"])


def test_it_cannot_sample_and_says_what_can():
    with pytest.raises(NotImplementedError, match='"iddpm"'):
        SpeeDiffusion().sample()


def test_a_single_step_is_refused():
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        SpeeDiffusion(num_sampling_steps=1)
