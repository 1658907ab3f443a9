"""Every op by every provider: `pytest benchmarks/test_ops.py`, `-k "spatial and eager"` for one of them.

As with any pytest-benchmark, `--benchmark-save NAME` keeps a run and `--benchmark-compare` compares with it.
"""

import pytest

from opensora_fast.benchmarks.measuring.contest import OP_CALLS, op_results
from opensora_fast.benchmarks.providers.adamw import ADAMW_PROVIDERS, ADAMW_REFERENCES
from opensora_fast.benchmarks.providers.adamw_work import (
    UPDATE,
    adamw_results,
    make_adamw_work,
    parameter_shapes,
    update_call,
)
from opensora_fast.benchmarks.providers.attention import ATTENTION_PROVIDERS, ATTENTION_REFERENCE
from opensora_fast.benchmarks.providers.attention_work import KINDS, make_pack_attention_work
from opensora_fast.benchmarks.providers.elementwise import (
    ELEMENTWISE_PROVIDERS,
    ELEMENTWISE_REFERENCE,
    OPS,
    make_elementwise_work,
)
from opensora_fast.benchmarks.providers.mlp import MLP_PROVIDERS, MLP_REFERENCE, make_mlp_work
from opensora_fast.benchmarks.pytest_support import current_scale, time_provider
from opensora_fast.benchmarks.shapes import Pack


@pytest.fixture(scope="module")
def scale():
    return current_scale()


@pytest.fixture(params=list(OP_CALLS))
def direction(request):
    return request.param


def small_pack(scale):
    """About the tokens of a check in float64."""
    return Pack.of(scale.headline[0]).shortened(scale.check_tokens)


@pytest.mark.parametrize("provider", ELEMENTWISE_PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("op", OPS)
def test_elementwise(benchmark, scale, op, provider, direction):
    benchmark.group = f"{op} {direction}"
    work = make_elementwise_work(op, small_pack(scale), scale.device, scale.dtype, scale.config.hidden_size)
    references = (ELEMENTWISE_REFERENCE,)
    time_provider(benchmark, provider, references, work, direction, OP_CALLS[direction], op_results)


@pytest.mark.parametrize("provider", MLP_PROVIDERS, ids=lambda provider: provider.name)
def test_mlp(benchmark, scale, provider, direction):
    benchmark.group = f"mlp {direction}"
    channels = scale.config.hidden_size
    hidden = int(channels * scale.config.mlp_ratio)
    work = make_mlp_work(small_pack(scale).tokens, channels, hidden, scale.device, scale.dtype)
    time_provider(benchmark, provider, (MLP_REFERENCE,), work, direction, OP_CALLS[direction], op_results)


@pytest.mark.parametrize("provider", ADAMW_PROVIDERS, ids=lambda provider: provider.name)
def test_adamw(benchmark, scale, provider):
    benchmark.group = "adamw"
    work = make_adamw_work(parameter_shapes(scale.config.model_copy(update={"depth": 1})), scale.device, scale.dtype)
    time_provider(benchmark, provider, ADAMW_REFERENCES, work, UPDATE, update_call, adamw_results)


@pytest.mark.parametrize("provider", ATTENTION_PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(benchmark, scale, kind, provider, direction):
    benchmark.group = f"{kind}_attention {direction}"
    shapes = small_pack(scale).shapes
    text = [scale.text] * len(shapes)
    sizes = (scale.config.num_heads, scale.config.head_size)
    work = make_pack_attention_work(kind, shapes, text, scale.device, scale.dtype, *sizes)
    references = (ATTENTION_REFERENCE,)
    time_provider(benchmark, provider, references, work, direction, OP_CALLS[direction], op_results)
