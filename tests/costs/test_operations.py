"""Counted operations equal what is worked out by hand and what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.benchmarks.shapes import Workload, fill
from opensora_fast.costs.operations import (
    attention_flops_per_token,
    count_block,
    count_forward,
    count_recomputation,
    count_training_step,
    linear_flops_per_token,
)

XL = STDiT2Config.xl_2()


def test_linear_layers_cost_36_c_squared_per_token_and_layer():
    assert linear_flops_per_token(XL) == 36 * 1152**2 * 28
    assert linear_flops_per_token(XL) == pytest.approx(1.338e9, rel=1e-3)


def test_attention_costs_4_c_times_the_lengths():
    assert attention_flops_per_token(XL, 144, 16, 120) == 4 * 1152 * (144 + 16 + 120) * 28


@pytest.mark.parametrize(
    ("resolution", "frame_tokens", "giga_flops"),
    [("144p", 144, 4.15), ("240p", 405, 4.23), ("360p", 920, 4.43), ("480p", 1590, 4.68), ("720p", 3600, 5.46)],
)
def test_tokens_and_training_operations_of_the_five_resolutions(resolution, frame_tokens, giga_flops):
    workload = fill(resolution, 16, 50_000)
    assert workload.frame_tokens == frame_tokens
    assert 3 * count_forward(XL, workload, 120).flops / workload.tokens / 1e9 == pytest.approx(giga_flops, abs=0.006)


def test_one_block_by_hand():
    """32 400 tokens of 5 videos of 16 frames of 405, 120 text tokens each; C = 1152, 28 blocks in the model."""
    forward, both = count_block(XL, Workload("240p", 16, 5), 120)
    tokens, channels = 32_400, 1152
    assert forward.flops == pytest.approx(
        tokens * 36 * channels**2 + tokens * 4 * channels * (405 + 16 + 120) + 5 * 120 * 4 * channels**2
    )
    assert forward.bytes == 15 * tokens * 2304
    assert both.flops == pytest.approx(3 * forward.flops)
    assert both.bytes == (15 + 21) * tokens * 2304


def test_a_training_step_moves_every_row_of_every_block_and_the_state_of_each_parameter():
    workload = Workload("240p", 16, 5)
    step = count_training_step(XL, workload, 120, parameters=1_000_000)
    assert step.bytes == 28 * (15 + 21) * 32_400 * 2304 + 36_000_000
    assert step.flops == 3 * count_forward(XL, workload, 120).flops


def test_the_model_has_767_million_parameters():
    with torch.device("meta"):
        model = STDiT2(XL)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(767.5, abs=0.1)


def test_torch_counts_the_same_operations():
    config = STDiT2Config.small()
    workload = Workload("144p", 2, batch=2)
    model = STDiT2(config).eval()
    frames, height, width = workload.latent
    ones = torch.ones(workload.batch)
    # The counter does not know the CPU's fused attention, so attention runs as the matrix products it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(
            torch.randn(workload.batch, 4, frames, height, width),
            ones,
            torch.randn(workload.batch, 1, 8, 32),
            num_frames=ones,
            height=ones * 144,
            width=ones * 256,
            ar=ones,
            fps=ones,
        )
        forward = counter.get_total_flops()
        output.sum().backward()
    # What is not counted per token: the vectors of time, size and modulation, of which there is one per video.
    assert forward == pytest.approx(count_forward(config, workload, 8).flops, rel=0.02)
    training = count_training_step(config, workload, 8, parameters=0)
    assert counter.get_total_flops() == pytest.approx(training.flops, rel=0.02)


def test_recomputing_every_block_is_nearly_another_forward():
    workload = fill("240p", 16, 50_000)
    forward, again = count_forward(XL, workload, 120), count_recomputation(XL, workload, 120, XL.depth)
    assert again.bytes == forward.bytes
    assert 0.98 * forward.flops < again.flops < forward.flops
    assert count_recomputation(XL, workload, 120, 7).flops == pytest.approx(again.flops / 4)
