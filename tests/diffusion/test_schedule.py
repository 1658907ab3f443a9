"""Which steps a schedule keeps, and the coefficients that follow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.diffusion import IDDPM, SCHEDULERS, build_scheduler
from opensora_fast.diffusion.schedule import Schedule, choose_timesteps, make_betas


def test_respacing_to_100_steps_gives_the_golden_steps_and_betas(golden):
    expected = golden("respace_100")
    diffusion = IDDPM(num_sampling_steps=100)
    assert diffusion.timestep_map == expected["timestep_map"].tolist()
    torch.testing.assert_close(diffusion.betas, expected["betas"], rtol=0, atol=1e-12)


def test_the_linear_schedule_runs_from_1e_4_to_0_02_and_scales_with_the_step_count():
    betas = make_betas("linear", 1000)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    torch.testing.assert_close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))
    shorter = torch.cumprod(1 - make_betas("linear", 500), 0)[-1]
    assert shorter.log().item() == pytest.approx(torch.cumprod(1 - betas, 0)[-1].log().item(), rel=0.02)


def test_the_cosine_schedule_follows_its_formula_up_to_the_cap():
    alphas_cumprod = torch.cumprod(1 - make_betas("squaredcos_cap_v2", 1000), 0)
    for step in (0, 1, 500, 990):
        fraction = ((step + 1) / 1000 + 0.008) / 1.008
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert alphas_cumprod[step].item() == pytest.approx(math.cos(fraction * math.pi / 2) ** 2 / start, rel=1e-9)
    assert make_betas("squaredcos_cap_v2", 1000).max().item() == 0.999


@pytest.mark.parametrize(
    ("steps", "respacing", "expected"),
    [
        (10, "10", list(range(10))),
        (10, "5", [0, 2, 4, 7, 9]),  # 2.25 apart; halves round to even
        (10, "1", [0]),
        (10, "3,2", [0, 2, 4, 5, 9]),
        (11, "2,2", [0, 5, 6, 10]),  # the first section takes the odd step
        (10, [2, 0], [0, 4]),
        (10, "ddim5", [0, 2, 4, 6, 8]),
        (10, "ddim2", [0, 5]),  # as would strides of 6 to 9
        (1000, "ddim50", list(range(0, 1000, 20))),
        (1, "ddim1", [0]),
    ],
)
def test_steps_are_spread_evenly_over_each_section(steps, respacing, expected):
    assert choose_timesteps(steps, respacing) == expected


@given(
    sections=st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=5).filter(
        lambda sections: len({length for length, _ in sections}) == 1
    )
)
def test_each_section_keeps_its_count_and_its_two_ends(sections):
    length = sections[0][0]
    counts = [1 + round(share * (length - 1)) for _, share in sections]
    kept = choose_timesteps(length * len(counts), counts)
    for index, count in enumerate(counts):
        section = [step - index * length for step in kept if step // length == index]
        assert len(section) == count
        assert section[0] == 0 and (count == 1 or section[-1] == length - 1)


@pytest.mark.parametrize("respacing", ["", "abc", "10,", "-3", "ddim", "ddimx", "1001", "600,10", "ddim999", "0", []])
def test_a_respacing_that_cannot_be_kept_is_named(respacing):
    with pytest.raises(ValueError, match="timestep_respacing"):
        choose_timesteps(1000, respacing)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps"),
        ({"num_sampling_steps": 10, "timestep_respacing": "10"}, "only one"),
        ({"noise_schedule": "linaer"}, "linaer"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
        ({"diffusion_steps": 20}, "diffusion_steps=20 is too few"),
    ],
)
def test_arguments_that_give_no_schedule_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        IDDPM(**arguments)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 250, 999, 1000])
def test_every_number_of_sampling_steps_gives_finite_tables(count):
    diffusion = IDDPM(num_sampling_steps=count)
    assert diffusion.num_timesteps == len(diffusion.timestep_map) == len(diffusion.betas) == count
    for name in Schedule.TABLES:
        table = getattr(diffusion.schedule, name)
        assert table.shape == (count,) and table.dtype == torch.float32 and table.isfinite().all(), name


def test_a_single_step_has_the_log_variance_of_its_beta():
    schedule = IDDPM(num_sampling_steps=1).schedule
    assert torch.equal(schedule.posterior_log_variance_clipped, schedule.log_betas)


def test_an_empty_respacing_keeps_all_steps():
    """As Open-Sora's configurations write it."""
    assert IDDPM(timestep_respacing="").timestep_map == list(range(1000))


def test_respacing_keeps_the_noise_level_of_the_kept_steps():
    full, short = IDDPM().schedule, IDDPM(timestep_respacing="10,20").schedule
    kept = full.alphas_cumprod[short.timestep_map]
    torch.testing.assert_close(short.alphas_cumprod, kept, rtol=1e-5, atol=0)


def test_tables_are_those_of_the_formulas():
    schedule = IDDPM(num_sampling_steps=50).schedule
    betas = schedule.betas.double()
    bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    expected = {
        "log_betas": betas.log(),
        "alphas_cumprod": bar,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "sqrt_recip_alphas_cumprod": bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - bar),
    }
    for name, values in expected.items():
        # 1e-3: at the least noisy steps 1 - alpha_bar has few digits in float32.
        torch.testing.assert_close(getattr(schedule, name).double(), values, rtol=1e-3, atol=1e-6, msg=name)


def test_lookup_shapes_a_value_per_video_for_multiplication_on_its_device():
    schedule = IDDPM().schedule
    t = torch.tensor([999, 0])
    on_another_device = schedule.lookup("betas", t.to("meta"), torch.zeros(2, 4, device="meta"))
    assert on_another_device.is_meta
    values = schedule.lookup("betas", t, torch.zeros(2, 4, 3, 5, 6))
    assert values.shape == (2, 1, 1, 1, 1)
    assert torch.equal(values.flatten(), schedule.betas[t])
    assert schedule.lookup("betas", t, torch.zeros(2, 4)).shape == (2, 1)


def test_a_scheduler_is_built_from_its_configuration_section():
    diffusion = build_scheduler({"type": "iddpm", "num_sampling_steps": 100, "cfg_scale": 7.0, "cfg_channel": 3})
    assert isinstance(diffusion, IDDPM)
    assert (diffusion.num_timesteps, diffusion.cfg_scale, diffusion.cfg_channel) == (100, 7.0, 3)
    for name, kind in SCHEDULERS.items():
        assert type(build_scheduler({"type": name})) is kind


@pytest.mark.parametrize("config", [{"type": "ddpm"}, {}, {"type": "iddpm", "steps": 3}])
def test_an_unknown_scheduler_or_key_is_named(config):
    with pytest.raises(ValueError, match="ddpm|None|steps"):
        build_scheduler(config)
