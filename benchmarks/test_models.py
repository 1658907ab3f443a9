"""Blocks and training steps by every provider: `pytest benchmarks/test_models.py`."""

import pytest

from opensora_fast.benchmarks.measuring.contest import OP_CALLS, op_results
from opensora_fast.benchmarks.providers.blocks import BLOCK_PROVIDERS, BLOCK_REFERENCES, make_block_work
from opensora_fast.benchmarks.providers.model_work import TRAINING, make_model_work, make_training
from opensora_fast.benchmarks.providers.models import (
    MODEL_PROVIDERS,
    MODEL_REFERENCES,
    model_results,
    training_call,
)
from opensora_fast.benchmarks.pytest_support import current_scale, time_provider
from opensora_fast.benchmarks.shapes import Pack


@pytest.fixture(scope="module")
def scale():
    return current_scale()


@pytest.fixture(scope="module")
def pack(scale):
    return Pack.of(scale.headline[0]).shortened(scale.check_tokens)


@pytest.fixture(scope="module")
def training(scale):
    return make_training(scale.config, scale.device, scale.dtype)


@pytest.mark.parametrize("direction", list(OP_CALLS))
@pytest.mark.parametrize("provider", BLOCK_PROVIDERS, ids=lambda provider: provider.name)
def test_block(benchmark, scale, pack, provider, direction):
    benchmark.group = f"block {direction}"
    work = make_block_work(scale.config, pack, scale.text, scale.device, scale.dtype)
    time_provider(benchmark, provider, BLOCK_REFERENCES, work, direction, OP_CALLS[direction], op_results)


@pytest.mark.parametrize("provider", MODEL_PROVIDERS, ids=lambda provider: provider.name)
def test_training_step(benchmark, scale, pack, training, provider):
    benchmark.group = "training step"
    work = make_model_work(training.model, pack.parts[0], scale.text, training)
    time_provider(benchmark, provider, MODEL_REFERENCES, work, TRAINING, training_call, model_results)
