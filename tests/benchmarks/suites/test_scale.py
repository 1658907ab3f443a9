"""Sizes of the benchmarks follow the GPU that is there."""

import pytest

from opensora_fast.benchmarks.suites import scale
from opensora_fast.benchmarks.suites.scale import scale_of
from opensora_fast.costs.hardware import DATASHEETS, MIB


@pytest.fixture
def answer(monkeypatch):
    """answer(text) is what the driver says of the name and the memory of the GPU."""

    def say(text: str) -> None:
        monkeypatch.setattr(scale, "query_gpu", lambda *fields: text)
        scale._own_gpu.cache_clear()

    yield say
    scale._own_gpu.cache_clear()


@pytest.mark.parametrize(
    ("text", "rates", "memory"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "H100", 81559 * MIB),
        ("NVIDIA of Tomorrow, 24576", "H200", 24576 * MIB),
        ("", "H200", DATASHEETS["H200"].memory),
    ],
)
def test_a_gpu_has_the_memory_that_it_says_and_the_rates_of_its_datasheet(answer, text, rates, memory):
    answer(text)
    gpu = scale_of("cuda").gpu
    assert (gpu.matrix_flops, gpu.bandwidth) == (DATASHEETS[rates].matrix_flops, DATASHEETS[rates].bandwidth)
    assert gpu.memory == memory


def test_long_videos_of_every_length_are_measured_up_to_twice_the_tokens_of_a_filled_step():
    sizes = scale_of("cuda", DATASHEETS["H200"])
    assert {workload.frames for workload in sizes.long_videos} == {1, 32, 64, 128}
    assert max(workload.tokens for workload in sizes.long_videos) <= 2 * sizes.tokens


def test_what_lies_beside_a_step_leaves_it_fewer_tokens():
    sizes = scale_of("cuda", DATASHEETS["H200"])
    assert sizes.most_tokens("ours", beside=40e9) < sizes.most_tokens("ours")
