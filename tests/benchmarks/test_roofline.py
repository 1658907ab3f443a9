"""Floors and projections from counts and rates."""

import math

import pytest
from bench_toys import make_row

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.roofline import floor_seconds, floor_tokens_per_s, project_ms
from opensora_fast.benchmarks.shapes import VIDEO_SIZES, fill
from opensora_fast.costs.hardware import DATASHEETS, Gpu
from opensora_fast.costs.operations import count_training_step

XL = STDiT2Config.xl_2()
PARAMETERS = 767.5e6


def test_the_floor_is_below_both_limits_and_falls_with_resolution():
    gpu = Gpu("H200", 790e12, 4.3e12, "measured")
    floors = [floor_tokens_per_s(XL, fill(name, 16, 50_000), 120, PARAMETERS, gpu) for name in VIDEO_SIZES]
    assert floors == sorted(floors, reverse=True)
    workload = fill("240p", 16, 50_000)
    count = count_training_step(XL, workload, 120, PARAMETERS)
    assert floors[1] < workload.tokens / (count.flops / gpu.matrix_flops)
    assert floors[1] < workload.tokens / (count.bytes / gpu.bandwidth)


@pytest.mark.parametrize(
    ("level", "flops", "bytes", "seconds"),
    [
        ("op", 2e12, 1e9, 2.0),  # one kernel reads while it computes
        ("gemm", 2e12, 3e9, 3.0),
        ("block", 2e12, 1e9, 3.0),  # several take their turns
        ("step", 2e12, 0.0, 2.0),
        ("copy", 0.0, 1e9, 1.0),
        ("loader", 0.0, 0.0, math.nan),
    ],
)
def test_the_floor_of_a_row_follows_from_what_is_counted(level, flops, bytes, seconds):
    floor = floor_seconds(make_row(level=level, flops=flops, bytes=bytes), Gpu("a GPU", 1e12, 1e9, "round numbers"))
    assert floor == pytest.approx(seconds, nan_ok=True)


def test_a_projection_scales_each_part_by_its_own_rate():
    projected = project_ms(100.0, 10.0, DATASHEETS["H200"], DATASHEETS["H800"])
    assert projected == pytest.approx(100 + 10 * 4.8 / 3.35)
