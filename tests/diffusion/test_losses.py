"""Training losses: equal to Open-Sora's, to their definition, and blind to given frames."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from opensora_fast.diffusion import IDDPM, DPMSolver, MaskGenerator, SpeeDiffusion

SHAPE = (3, 4, 5, 2, 3)


def make_case(shape=SHAPE, seed=0, steps=1000):
    generator = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]
    return {
        "x": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "t": torch.randint(0, steps, (batch,), generator=generator),
        "output": torch.randn(batch, 2 * channels, *shape[2:], generator=generator),
    }


def losses_of(diffusion, case, mask=None, **arguments):
    return diffusion.training_losses(
        lambda x_t, t: case["output"], case["x"], case["t"], {}, case["noise"], mask, **arguments
    )


@pytest.mark.parametrize("name", ["iddpm_loss_plain", "iddpm_loss_masked"])
def test_losses_and_the_models_input_equal_the_golden_file(golden, name):
    data = golden(name)
    seen = []

    def model(x_t, timestep):
        seen.append((x_t, timestep))
        return data["model_output"]

    losses = IDDPM().training_losses(model, data["x"], data["t"], {}, data["noise"], data.get("mask"))
    [(x_t, timestep)] = seen
    assert torch.equal(timestep, data["t"])
    torch.testing.assert_close(x_t, data["x_t"], rtol=1e-5, atol=1e-6)
    for key in ("mse", "vb", "loss"):
        torch.testing.assert_close(losses[key], data[key], rtol=1e-5, atol=1e-7, msg=key)


def test_tables_and_draws_are_of_the_host_whatever_the_default_device_is():
    case = make_case()
    expected = losses_of(IDDPM(), case)["loss"]
    speed, masks, generator = SpeeDiffusion(), MaskGenerator({"mask_quarter_random": 1.0}), torch.Generator()
    draws = [IDDPM().draw_timesteps(9, generator), speed.draw_timesteps(9, generator), masks.draw(9, generator)]
    with torch.device("meta"):
        assert torch.equal(losses_of(IDDPM(), case)["loss"], expected)
        DPMSolver()
        speed, masks, generator = SpeeDiffusion(), MaskGenerator({"mask_quarter_random": 1.0}), torch.Generator()
        again = [IDDPM().draw_timesteps(9, generator), speed.draw_timesteps(9, generator), masks.draw(9, generator)]
    assert all(torch.equal(*pair) for pair in zip(draws, again, strict=True))


def test_the_bound_is_the_kl_divergence_of_the_two_posteriors_in_bits():
    case = make_case()
    case["t"] = torch.tensor([999, 400, 30])
    vb = losses_of(IDDPM(), case)["vb"]

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    for index, t in enumerate(case["t"].tolist()):
        x, noise, output = (case[key][index].double() for key in ("x", "noise", "output"))
        x_t = bar[t].sqrt() * x + (1 - bar[t]).sqrt() * noise
        variance = betas[t] * (1 - bar[t - 1]) / (1 - bar[t])

        def posterior_mean(x_start, t=t, x_t=x_t):
            weighted = bar[t - 1].sqrt() * betas[t] * x_start + (1 - betas[t]).sqrt() * (1 - bar[t - 1]) * x_t
            return weighted / (1 - bar[t])

        x_start = (x_t - (1 - bar[t]).sqrt() * output[:4]) / bar[t].sqrt()
        learned = torch.exp((output[4:] + 1) / 2 * betas[t].log() + (1 - output[4:]) / 2 * variance.log())
        expected = kl_divergence(
            Normal(posterior_mean(x), variance.sqrt()), Normal(posterior_mean(x_start), learned.sqrt())
        )
        assert vb[index].item() == pytest.approx(expected.mean().item() / math.log(2), rel=2e-3)


def test_at_step_0_the_bound_is_the_likelihood_of_256_levels():
    case = make_case()
    case["t"] = torch.zeros(3, dtype=torch.int64)
    case["x"] = ((case["x"].clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert case["x"].min() == -1 and case["x"].max() == 1  # the outermost levels, which take the whole tail
    case["output"][:, :4] = case["noise"] + 0.5 * case["output"][:, :4]
    diffusion = IDDPM()
    vb = losses_of(diffusion, case)["vb"]
    x = case["x"].double()
    prediction = diffusion.predict(case["output"], diffusion.q_sample(case["x"], case["t"], case["noise"]), case["t"])
    distribution = Normal(prediction.mean.double(), (0.5 * prediction.log_variance.double()).exp())
    upper = torch.where(x > 0.999, torch.ones_like(x), distribution.cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), distribution.cdf(x - 1 / 255))
    expected = -(upper - lower).clamp(min=1e-12).log().flatten(1).mean(1) / math.log(2)
    # 2 %: the loss uses the tanh approximation of the normal distribution.
    torch.testing.assert_close(vb.double(), expected, rtol=0.02, atol=0)


def test_masked_losses_are_those_of_the_noised_frames_alone():
    case = make_case()
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False], [True] * 5])
    case["t"] = torch.tensor([0, 7, 900])
    losses = losses_of(IDDPM(), case, mask)
    for index in range(3):
        part = {key: case[key][index : index + 1][:, :, mask[index]] for key in ("x", "noise", "output")}
        part["t"] = case["t"][index : index + 1]
        alone = losses_of(IDDPM(), part)
        for key in ("mse", "vb", "loss"):
            torch.testing.assert_close(losses[key][index], alone[key][0], rtol=2e-6, atol=1e-7, msg=key)


def test_given_frames_are_noised_to_step_0_with_the_same_noise():
    case = make_case()
    diffusion = IDDPM()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    seen = []

    def model(x_t, timestep):
        seen.append(x_t)
        return case["output"]

    diffusion.training_losses(model, case["x"], case["t"], {}, case["noise"], mask)
    for index in range(3):
        for frame in range(5):
            t = case["t"][index : index + 1] if mask[index, frame] else torch.zeros(1, dtype=torch.int64)
            x, noise = (case[key][index : index + 1, :, frame : frame + 1] for key in ("x", "noise"))
            assert torch.equal(seen[0][index : index + 1, :, frame : frame + 1], diffusion.q_sample(x, t, noise))


def test_a_mask_of_noised_frames_only_changes_nothing():
    case = make_case()
    plain, masked = losses_of(IDDPM(), case), losses_of(IDDPM(), case, torch.ones(3, 5, dtype=torch.bool))
    for key in plain:
        torch.testing.assert_close(masked[key], plain[key], rtol=2e-6, atol=0)


def test_a_video_of_given_frames_only_has_no_loss_and_no_gradient():
    case = make_case()
    case["output"].requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    losses = losses_of(IDDPM(), case, mask)
    assert losses["loss"][1] == 0 and losses["loss"].isfinite().all()
    losses["loss"].sum().backward()
    assert case["output"].grad[1].abs().max() == 0 and case["output"].grad.isfinite().all()
    assert case["output"].grad[0].abs().min() > 0


def test_the_bound_trains_the_variance_and_not_the_mean():
    case = make_case()
    case["output"].requires_grad_()
    [gradient] = torch.autograd.grad(losses_of(IDDPM(), case)["vb"].sum(), case["output"])
    assert gradient[:, :4].abs().max() == 0 and gradient[:, 4:].abs().max() > 0
    [gradient] = torch.autograd.grad(losses_of(IDDPM(), case)["mse"].sum(), case["output"])
    assert gradient[:, 4:].abs().max() == 0 and gradient[:, :4].abs().max() > 0


def test_a_respaced_process_tells_the_model_the_original_timesteps():
    case = make_case(steps=10)
    seen = []

    def model(x_t, timestep):
        seen.append(timestep)
        return case["output"]

    diffusion = IDDPM(num_sampling_steps=10)
    diffusion.training_losses(model, case["x"], case["t"])
    assert seen[0].tolist() == [diffusion.timestep_map[t] for t in case["t"].tolist()]


def test_weights_multiply_the_squared_error_by_step():
    case = make_case()
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    plain, weighted = losses_of(IDDPM(), case), losses_of(IDDPM(), case, weights=weights)
    torch.testing.assert_close(weighted["mse"], plain["mse"] * weights[case["t"]])
    assert torch.equal(weighted["vb"], plain["vb"])


def test_variants_of_the_loss():
    case = make_case(steps=100)
    plain = losses_of(IDDPM(num_sampling_steps=100), case)
    rescaled = losses_of(IDDPM(num_sampling_steps=100, rescale_learned_sigmas=True), case)
    torch.testing.assert_close(rescaled["vb"], plain["vb"] / 10)
    bound_only = losses_of(IDDPM(num_sampling_steps=100, use_kl=True), case)
    torch.testing.assert_close(bound_only["loss"], plain["vb"] * 100)
    start = losses_of(IDDPM(num_sampling_steps=100, predict_xstart=True), case)
    torch.testing.assert_close(start["mse"], ((case["output"][:, :4] - case["x"]) ** 2).flatten(1).mean(1))
    case["output"] = case["output"][:, :4]
    fixed = losses_of(IDDPM(num_sampling_steps=100, learn_sigma=False), case)
    assert "vb" not in fixed and torch.equal(fixed["loss"], plain["mse"])


@pytest.mark.parametrize(("small", "expected"), [(True, "posterior_variance"), (False, "betas")])
def test_fixed_variances(small, expected):
    diffusion = IDDPM(num_sampling_steps=10, learn_sigma=False, sigma_small=small)
    case = make_case(steps=10)
    case["t"] = torch.tensor([9, 1, 0])
    log_variance = diffusion.predict(case["x"], case["x"], case["t"]).log_variance.flatten()
    table = getattr(diffusion.schedule, expected)
    torch.testing.assert_close(log_variance[:2].exp(), table[[9, 1]])
    # At step 0 the posterior variance is 0; that of step 1 takes its place.
    torch.testing.assert_close(log_variance[2].exp(), diffusion.schedule.posterior_variance[1], rtol=1e-6, atol=0)


def test_every_step_is_as_likely_to_be_trained_at():
    diffusion = IDDPM(num_sampling_steps=10)
    steps = diffusion.draw_timesteps(100_000, torch.Generator().manual_seed(0))
    assert steps.dtype == torch.int64
    assert (torch.bincount(steps) / len(steps)).tolist() == pytest.approx([0.1] * 10, abs=0.005)


def test_noise_comes_from_the_generator():
    case = make_case()
    seen = []

    def model(x_t, timestep):
        seen.append(x_t)
        return case["output"]

    for seed in (1, 1, 2):
        IDDPM().training_losses(model, case["x"], case["t"], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_conditioning_reaches_the_model_and_stays_as_it_is():
    case = make_case()
    conditioning = {"fps": torch.ones(3)}
    seen = []

    def model(x_t, timestep, **given):
        seen.append(given)
        return case["output"]

    IDDPM().training_losses(model, case["x"], case["t"], conditioning)
    assert seen == [conditioning] and list(conditioning) == ["fps"]


def test_losses_never_read_a_value_back_to_the_host(monkeypatch):
    """On a GPU each of these calls would wait for it."""

    def refuse(*arguments, **keywords):
        raise AssertionError("training_losses read a value back")

    case, diffusion, mask = make_case(), IDDPM(), torch.ones(3, 5, dtype=torch.bool)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "nonzero", "masked_select"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    losses_of(diffusion, case, mask)


@pytest.mark.gpu
def test_losses_never_wait_for_the_gpu():
    case = {key: value.cuda() for key, value in make_case().items()}
    case["t"] = case["t"].cpu()
    diffusion, mask = IDDPM(), torch.ones(3, 5, dtype=torch.bool)
    losses_of(diffusion, case, mask)  # copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = losses_of(diffusion, case, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = losses_of(IDDPM(), make_case(), mask)
    torch.testing.assert_close(losses["loss"].cpu(), on_host["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1, 1), (2, 4, 1, 3, 5), (1, 1, 7, 2, 2)])
def test_any_shape_gives_one_finite_loss_for_each_video(shape):
    losses = losses_of(IDDPM(), make_case(shape), torch.ones(shape[0], shape[2], dtype=torch.bool))
    for value in losses.values():
        assert value.shape == (shape[0],) and value.isfinite().all()


def test_wrong_shapes_are_named():
    case, diffusion = make_case(), IDDPM()
    with pytest.raises(ValueError, match="one step for each of the 3 videos"):
        losses_of(diffusion, {**case, "t": torch.tensor([3])})
    with pytest.raises(ValueError, match="t must hold integers"):
        losses_of(diffusion, {**case, "t": case["t"].float()})
    with pytest.raises(ValueError, match="noise must have the shape of x"):
        losses_of(diffusion, {**case, "noise": case["noise"][:, :, :1]})
    with pytest.raises(ValueError, match="mask must have shape"):
        losses_of(diffusion, case, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the model returned shape"):
        losses_of(diffusion, {**case, "output": case["output"][:, :5]})
