"""Ancestral sampling with guidance and frame masks."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from opensora_fast.diffusion import IDDPM, DPMSolver
from opensora_fast.diffusion.guidance import GuidedModel, each_step, encode_with_unconditional
from opensora_fast.diffusion.noise import draw_noise_like
from opensora_fast.progress import Progress

from .conftest import GOLDEN
from .toys import ToyModel, ToyTextEncoder


def test_the_masked_chain_equals_the_golden_file(golden, no_noise):
    from opensora_fast import STDiT2, STDiT2Config

    data = golden("sample_chain_masked")
    with safe_open(GOLDEN / "sample_chain_masked.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    model = STDiT2(STDiT2Config(**meta["config"])).eval()
    model.load_state_dict(golden("stdit2_weights"), strict=True)
    text_encoder = SimpleNamespace(encode=lambda prompts: {"y": data["y"], "mask": data["text_mask"]})
    diffusion = IDDPM(num_sampling_steps=meta["steps"], cfg_scale=meta["cfg_scale"], cfg_channel=meta["cfg_channel"])
    conditioning = {key.removeprefix("info."): value for key, value in data.items() if key.startswith("info.")}
    out = diffusion.sample(
        model, text_encoder, data["z"], ["a", "b"], "cpu", conditioning, data["mask"], progress=False
    )
    assert ((out - data["out"]).norm() / data["out"].norm()).item() < 1e-4


def reference_chain(model, text_encoder, z, mask, steps, cfg_scale, cfg_channel):
    """The same sampler without noise, from the formulas, one video and one frame at a time in float64."""
    full = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    timesteps = torch.linspace(0, 999, steps, dtype=torch.float64).round().long()
    bar = full[timesteps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    betas = 1 - bar / before
    count, channels, frames = z.shape[:3]
    text = torch.cat([text_encoder.y, text_encoder.null(count)])
    x = z.clone()
    for step in reversed(range(steps)):
        first_step = (mask * steps).int()
        x_in = x.clone()
        for video in range(count):
            for frame in range(frames):
                if first_step[video, frame] == step:
                    x_in[video, :, frame] *= bar[step].sqrt()
        x_mask = first_step > step
        output = model(
            torch.cat([x_in, x_in]), timesteps[step].expand(2 * count), text, x_mask=torch.cat([x_mask, x_mask])
        )
        for video in range(count):
            eps = output[video, :channels].clone()
            plain = output[count + video, :cfg_channel]
            eps[:cfg_channel] = plain + cfg_scale * (eps[:cfg_channel] - plain)
            x_start = (x_in[video] - (1 - bar[step]).sqrt() * eps) / bar[step].sqrt()
            mean = before[step].sqrt() * betas[step] * x_start
            mean = (mean + (1 - betas[step]).sqrt() * (1 - before[step]) * x_in[video]) / (1 - bar[step])
            for frame in range(frames):
                if first_step[video, frame] >= step:
                    x[video, :, frame] = mean[:, frame]
    return x


def test_sampling_asks_the_device_for_no_number():
    """The meta device stands in for a GPU. It has no values, so asking for one, for which the host would wait, is an
    error."""
    text_encoder, model = ToyTextEncoder(2), ToyModel()
    text_encoder.y, text_encoder.empty, model.mix = (
        tensor.to("meta") for tensor in (text_encoder.y, text_encoder.empty, model.mix)
    )
    z, mask = torch.randn(2, 4, 5, 2, 3), torch.tensor([[0.0, 1.0, 0.5, 0.99, 0.3], [1.0] * 5])
    given = {"fps": torch.ones(2)}
    for generator in (None, [torch.Generator().manual_seed(seed) for seed in (0, 1)]):
        out = IDDPM(num_sampling_steps=3, cfg_channel=3).sample(
            model, text_encoder, z, ["a", "b"], "meta", given, mask, generator=generator, progress=False
        )
        assert out.is_meta and out.shape == z.shape
    assert len(model.calls) == 6 and model.calls[-1]["x_mask"].is_meta


@pytest.mark.parametrize("steps", [2, 7, 25])
@pytest.mark.parametrize("cfg_channel", [1, 3, 4])
def test_the_chain_is_that_of_the_formulas(no_noise, steps, cfg_channel):
    generator = torch.Generator().manual_seed(steps)
    z = torch.randn(2, 4, 5, 2, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0.0, 1.0, 0.5, 0.99, 0.3], [1.0, 1.0, 0.0, 0.1, 1.0]])
    text_encoder = ToyTextEncoder(2, dtype=torch.float64)
    diffusion = IDDPM(num_sampling_steps=steps, cfg_scale=4.0, cfg_channel=cfg_channel)
    out = diffusion.sample(ToyModel(), text_encoder, z, ["a", "b"], "cpu", mask=mask, progress=False)
    expected = reference_chain(ToyModel(), text_encoder, z, mask, steps, 4.0, cfg_channel)
    # 5e-4: in float32 the coefficients of the least noisy steps have few digits.
    assert ((out - expected).norm() / expected.norm()).item() < 5e-4


@pytest.mark.parametrize("variance", [True, False])
def test_all_noise_is_guided_and_no_variance(variance):
    z = torch.zeros(1, 4, 2, 2, 3)

    def predict(x, timestep):
        """2 with the text, 1 without."""
        channels = 8 if variance else 4
        return torch.tensor([2.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, channels, *x.shape[2:])

    def guide(cfg_channel):
        return GuidedModel(predict, 3.0, cfg_channel)(z, torch.zeros(1)).mean((0, 2, 3, 4)).tolist()

    assert guide(None) == guide(4) == [4.0] * 4 + [2.0] * 4 * variance
    assert guide(3) == [4.0] * 3 + [2.0] + [2.0] * 4 * variance
    with pytest.raises(ValueError, match="cfg_channel=5: 4 channels can be guided"):
        guide(5)


def test_a_kept_frame_stays_clean_and_marked_as_given_until_its_step(toy_model):
    z = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    diffusion = IDDPM(num_sampling_steps=10)
    diffusion.sample(
        toy_model, ToyTextEncoder(1), z, ["a"], "cpu", mask=torch.tensor([[0.0, 1.0, 0.5]]), progress=False
    )
    assert len(toy_model.calls) == 10
    for call, step in zip(toy_model.calls, reversed(range(10)), strict=True):
        frames = call["x"][0]
        assert torch.equal(frames[:, 0], z[0, :, 0]) == (step > 0)  # at its step 0 it is noised a little
        assert torch.equal(frames[:, 2], z[0, :, 2]) == (step > 5)
        assert call["x_mask"][0].tolist() == [False, True, step < 5]


def test_the_model_sees_conditional_then_unconditional_rows_at_original_timesteps(toy_model):
    text_encoder = ToyTextEncoder(2)
    z = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    fps = torch.tensor([24.0, 12.0])
    conditioning = {"fps": fps}
    diffusion = IDDPM(num_sampling_steps=4)
    diffusion.sample(toy_model, text_encoder, z, ["a", "b"], "cpu", conditioning, mask=torch.rand(2, 3), progress=False)
    assert [call["timestep"].tolist() for call in toy_model.calls] == [[t] * 4 for t in (999, 666, 333, 0)]
    for call in toy_model.calls:
        assert torch.equal(call["y"], torch.cat([text_encoder.y, text_encoder.null(2)]))
        assert torch.equal(call["x"][:2], call["x"][2:]) and torch.equal(call["x_mask"][:2], call["x_mask"][2:])
        assert call["fps"] is fps and call["mask"].shape == (2, 3)
    assert list(conditioning) == ["fps"]


def test_without_a_mask_no_frame_is_marked(toy_model):
    IDDPM(num_sampling_steps=2).sample(
        toy_model, ToyTextEncoder(1), torch.zeros(1, 4, 1, 1, 1), ["a"], "cpu", progress=False
    )
    assert all(call["x_mask"] is None for call in toy_model.calls)


def test_a_mask_of_ones_generates_as_without_a_mask(no_noise, toy_model):
    z = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, masked = (
        IDDPM(num_sampling_steps=6).sample(
            lambda x, t, x_mask=None, **rest: ToyModel()(x, t, **rest),
            ToyTextEncoder(2),
            z,
            ["a", "b"],
            "cpu",
            mask=mask,
            progress=False,
        )
        for mask in (None, torch.ones(2, 3))
    )
    assert torch.equal(plain, masked)


def test_the_unconditional_text_is_the_models_where_the_encoder_has_none(toy_model):
    text_encoder = ToyTextEncoder(2)
    toy_model.y_embedder = SimpleNamespace(y_embedding=torch.full((3, 5), 0.25))
    encode_only = SimpleNamespace(encode=text_encoder.encode)
    z = torch.zeros(2, 4, 1, 1, 1)
    IDDPM(num_sampling_steps=1).sample(toy_model, encode_only, z, ["a", "b"], "cpu", progress=False)
    assert torch.equal(toy_model.calls[0]["y"][2:], torch.full((2, 1, 3, 5), 0.25))
    toy_model.y_embedder.y_embedding = torch.zeros(4, 5)
    with pytest.raises(
        ValueError, match=r"unconditional text has shape \(2, 1, 4, 5\), the encoded prompts \(2, 1, 3, 5\)"
    ):
        IDDPM(num_sampling_steps=1).sample(toy_model, encode_only, z, ["a", "b"], "cpu", progress=False)
    encoded = encode_with_unconditional(text_encoder, toy_model, ["a", "b"], "cpu")
    assert torch.equal(encoded["y"][2:], text_encoder.null(2))  # where it has one
    with pytest.raises(ValueError, match="needs an unconditional text"):
        IDDPM(num_sampling_steps=1).sample(ToyModel(), encode_only, z, ["a", "b"], "cpu", progress=False)


def test_what_the_text_encoder_gave_decides_the_dtype_and_stays_as_it_is():
    text_encoder = ToyTextEncoder(2)
    own = {"y": text_encoder.y.bfloat16(), "mask": torch.ones(2, 3)}
    text_encoder.encode = lambda prompts: own
    for _ in range(2):
        encoded = encode_with_unconditional(text_encoder, None, ["a", "b"], "cpu")
        assert encoded["y"].dtype == torch.bfloat16 and encoded["y"].shape == (4, 1, 3, 5)


def test_noise_is_added_at_every_step_but_the_last(toy_model):
    diffusion, x, conditioning = IDDPM(num_sampling_steps=3), torch.ones(1, 4, 1, 2, 2), {"y": torch.zeros(1, 1, 1, 1)}
    for step in (2, 1, 0):
        t = torch.tensor([step])
        mean, log_variance = diffusion.p_mean_variance(toy_model, x, t, conditioning)
        sample = diffusion.p_sample(toy_model, x, t, conditioning, draw_noise=torch.ones_like)
        torch.testing.assert_close(sample, mean + (log_variance / 2).exp() if step > 0 else mean)


def test_the_default_generator_draws_for_every_row_that_the_model_sees():
    """So that a seed gives the samples of Open-Sora: the second half of the noise is not used."""
    diffusion, z, text_encoder = IDDPM(num_sampling_steps=3), torch.zeros(2, 4, 1, 2, 2), ToyTextEncoder(2)
    torch.manual_seed(0)
    noise = iter([torch.randn(4, *z.shape[1:])[:2] for _ in range(3)])
    expected, guided = z, GuidedModel(ToyModel(), diffusion.cfg_scale)
    for step in (2, 1, 0):
        conditioning = encode_with_unconditional(text_encoder, None, ["a", "b"], "cpu")
        t = torch.full((2,), step)
        expected = diffusion.p_sample(guided, expected, t, conditioning, draw_noise=lambda like: next(noise))
    torch.manual_seed(0)
    assert torch.equal(diffusion.sample(ToyModel(), text_encoder, z, ["a", "b"], "cpu", progress=False), expected)


@pytest.mark.parametrize(("kind", "steps"), [(IDDPM, 1), (DPMSolver, 2)])
def test_samples_have_no_history_and_the_model_gets_float32(toy_model, kind, steps):
    toy_model.mix.requires_grad_()
    z = torch.ones(1, 4, 1, 1, 1, dtype=torch.bfloat16)
    out = kind(num_sampling_steps=steps).sample(toy_model, ToyTextEncoder(1), z, ["a"], "cpu", progress=False)
    assert out.shape == (1, 4, 1, 1, 1) and out.dtype == torch.float32 and out.isfinite().all()
    assert not out.requires_grad
    assert all(call["x"].dtype == torch.float32 for call in toy_model.calls)


def test_unguided_sampling_recovers_the_distribution_of_the_data():
    """Data N(2, 0.5^2): the exact noise prediction is known, and 20,000 samples must have that mean and spread."""
    diffusion = IDDPM(num_sampling_steps=100, cfg_scale=1.0, learn_sigma=False)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    def model(x, timestep, **conditioning):
        signal = bar[timestep].view(-1, 1, 1, 1, 1)
        return (1 - signal).sqrt() * (x - signal.sqrt() * 2.0) / (signal * 0.25 + 1 - signal)

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 1, 50, 100, generator=generator)
    out = diffusion.sample(model, ToyTextEncoder(1), z, ["a"], "cpu", generator=generator, progress=False)
    assert out.mean().item() == pytest.approx(2.0, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


def test_equal_seeds_give_equal_samples():
    def draw(seed, use_default):
        generator = None if use_default else torch.Generator().manual_seed(seed)
        if use_default:
            torch.manual_seed(seed)
        z = torch.zeros(1, 4, 2, 2, 2)
        return IDDPM(num_sampling_steps=3).sample(
            ToyModel(), ToyTextEncoder(1), z, ["a"], "cpu", generator=generator, progress=False
        )

    for use_default in (True, False):
        assert torch.equal(draw(1, use_default), draw(1, use_default))
        assert not torch.equal(draw(1, use_default), draw(2, use_default))


def test_with_a_generator_for_each_video_a_sample_does_not_depend_on_the_others():
    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return IDDPM(num_sampling_steps=3).sample(
            lambda x, timestep, **rest: torch.cat([x, x], dim=1),
            ToyTextEncoder(len(seeds)),
            torch.zeros(len(seeds), 4, 2, 2, 2),
            ["a"] * len(seeds),
            "cpu",
            mask=torch.tensor([[1.0, 0.5]] * len(seeds)),
            generator=generators,
            progress=False,
        )

    together = draw([1, 2, 3])
    for row, seed in enumerate([1, 2, 3]):
        torch.testing.assert_close(together[row], draw([seed])[0])
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 1 rows"):
        IDDPM(num_sampling_steps=1).sample(
            ToyModel(), ToyTextEncoder(1), torch.zeros(1, 4, 1, 1, 1), ["a"], "cpu", generator=[torch.Generator()] * 2
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_is_of_the_dtype_and_shape_of_what_it_is_for(dtype):
    like = torch.zeros(2, 4, 3, 1, 2, dtype=dtype)
    for generator in (None, torch.Generator(), [torch.Generator(), torch.Generator()]):
        noise = draw_noise_like(like, generator)
        assert noise.dtype == dtype and noise.shape == like.shape


def test_progress_is_shown_on_standard_error(capsys, toy_model):
    IDDPM(num_sampling_steps=2).sample(toy_model, ToyTextEncoder(1), torch.zeros(1, 4, 1, 1, 1), ["a"], "cpu")
    captured = capsys.readouterr()
    assert "2/2 steps" in captured.err and captured.out == ""


def test_a_running_progress_is_advanced_by_each_step(capsys, toy_model):
    with Progress("all", total=6, unit="steps") as progress:
        for _ in range(2):
            IDDPM(num_sampling_steps=2).sample(
                toy_model, ToyTextEncoder(1), torch.zeros(1, 4, 1, 1, 1), ["a"], "cpu", progress=progress
            )
        assert progress.completed == 4
        assert [progress.completed for _ in each_step(range(2), progress)] == [4, 5]  # a step counts behind its end
    assert "sample" not in capsys.readouterr().err


def test_wrong_counts_are_named(toy_model):
    diffusion, z = IDDPM(num_sampling_steps=2), torch.zeros(2, 4, 3, 1, 1)
    with pytest.raises(ValueError, match="2 rows for 1 prompts"):
        diffusion.sample(toy_model, ToyTextEncoder(1), z, ["a"], "cpu")
    with pytest.raises(ValueError, match="mask must have shape"):
        diffusion.sample(toy_model, ToyTextEncoder(2), z, ["a", "b"], "cpu", mask=torch.ones(2, 4))
