"""The price of mixing shapes, from rows."""

import pytest
from bench_toys import make_row

from opensora_fast.benchmarks.report.mixed import compare_mixed
from opensora_fast.benchmarks.shapes import Pack, Workload
from opensora_fast.benchmarks.suites import list_cases
from opensora_fast.benchmarks.suites.scale import scale_of

PACK = Pack("mixed", (Workload("144p", 16, 1), Workload("256", 1, 9)))  # 2304 + 2304 tokens
TOKENS = 9216


def step(pack: Pack, nanoseconds: float, provider: str = "ours", **changes):
    """A row of so many nanoseconds a token."""
    values = {"op": "", "direction": "training", "shape": f"{pack.text} L=120 C=1152 layers=28", "tokens": pack.tokens}
    milliseconds = nanoseconds * pack.tokens / 1e6
    return make_row(level="step", workload=pack.name, provider=provider, p50_ms=milliseconds, **values | changes)


def test_a_mixed_pack_is_compared_with_uniform_packs_of_its_shapes():
    uniform = [Pack.of(part) for part in PACK.uniform_parts(TOKENS)]
    assert [pack.text for pack in uniform] == ["B=4 T=16 S=144", "B=36 T=1 S=256"]
    rows = [step(PACK, 10.3), step(uniform[0], 8.0), step(uniform[1], 12.0), step(PACK, 20.0, "eager")]
    (cost,) = compare_mixed(rows, [PACK], TOKENS)  # eager has no uniform rows
    assert (cost.pack, cost.provider) == ("mixed", "ours")
    assert (cost.mixed_ns, cost.uniform_ns) == pytest.approx((10.3, 10.0)) and cost.ratio == pytest.approx(1.03)
    assert str(cost).startswith("mixed, ours: 1.030 ×")


def test_rows_of_other_sizes_do_not_count():
    uniform = [Pack.of(part) for part in PACK.uniform_parts(TOKENS)]
    other = Pack.of(Workload("144p", 16, 5))
    rows = [step(PACK, 10), step(other, 8.0), step(uniform[1], 12.0)]
    assert compare_mixed(rows, [PACK], TOKENS) == []
    encoders = step(uniform[0], 8.0, op="with encoders")
    assert compare_mixed([step(PACK, 10), encoders, step(uniform[1], 12.0)], [PACK], TOKENS) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_uniform_packs_are_measured(device):
    scale = scale_of(device)
    planned = {(case.template.workload, case.template.shape.partition(" L=")[0]) for case in list_cases("step", device)}
    for pack in scale.mixed_steps:
        assert (pack.name, pack.text) in planned
        for part in pack.uniform_parts(scale.tokens):
            assert (part.name, Pack.of(part).text) in planned
        assert device == "cpu" or abs(pack.tokens / scale.tokens - 1) < 0.05
