"""Predicted steps: added up by hand, and what the committed file says of itself."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from opensora_fast.benchmarks.predictions import RESOLUTIONS
from opensora_fast.benchmarks.predictions.kernels import H100, H200, MACHINES
from opensora_fast.benchmarks.predictions.steps import (
    TIMES,
    predict_steps,
    product_flops_per_token,
    project_rows,
    read_kernels,
    steps_path,
)
from opensora_fast.benchmarks.report.results import Results
from opensora_fast.costs.operations import linear_flops_per_token
from opensora_fast.kernels import PackLayout, spatial_attention
from opensora_fast.kernels.attention import spatial_backward, spatial_forward, spatial_preparation
from opensora_fast.model import STDiT2Config

ROOT = Path(__file__).parents[3]


def kernel(name, microseconds, workload):
    return {"workload": f"{workload}×16", "tokens": "1000", "kernel": name, "predicted_us": str(microseconds)}


def test_a_step_is_the_sum_of_its_launches():
    launches = [
        ("spatial_attention_forward", 2.0),
        ("spatial_attention_keys_backward", 3.0),
        ("gate_residual_modulated_norm_forward", 1.0),
        ("modulated_norm_forward", 1.0),
    ]
    rows = predict_steps(kernel(*launch, resolution) for resolution in RESOLUTIONS for launch in launches)
    assert [row["workload"] for row in rows] == [f"{name}×16" for name in RESOLUTIONS]
    row = rows[0]
    assert row["kind"] == "prediction"
    assert row["spatial_attention ns"] == 28 * (2.0 + 3.0)  # µs for 1000 tokens are ns for each
    assert row["norms and gates ns"] == 28 * 3 + 2  # three in a block; two in the model
    assert row["gelu_tanh ns"] == 0
    rest = 28 * 5 + 28 * 3 + 2 + row["optimizer ns"]
    assert row["k tokens/s, fast"] == pytest.approx(1e6 / (rest + row["products ns, fast"]), abs=0.06)
    # With products at this rate the step would take as long as the goal says.
    products = 1e-3 * 108 * 1152**2 * 28 / row["TFLOP/s of products for the goal"]
    assert 1e6 / (rest + products) == pytest.approx(row["goal"], rel=2e-3)


def test_spatial_attention_launches_its_kernels_as_often_as_is_counted(monkeypatch, interpreter, device):
    launched = Counter()
    for module in (spatial_forward, spatial_preparation, spatial_backward):

        def count(table, kernel, *others, select=module.select):
            launched[kernel] += 1
            return select(table, kernel, *others)

        monkeypatch.setattr(module, "select", count)
    monkeypatch.setattr(spatial_forward, "LONGEST_SMALL_FRAME", 0)
    # Not float32, which has a class of its own on a GPU.
    qkv = torch.randn(6, 3, 1, 24, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(24, device=device, dtype=torch.float16)
    spatial_attention(qkv, weight, weight, PackLayout.of([(1, 2, 3)], device), backend="triton").sum().backward()
    counted = {row["kernel"] for row in read_kernels() if row["kernel"].startswith("spatial_attention")}
    assert launched == {name: TIMES.get(name, 1.0) for name in counted}


def test_the_products_are_those_of_the_roofline():
    config = STDiT2Config.xl_2()
    assert sum(product_flops_per_token(config).values()) == 3 * linear_flops_per_token(config)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_the_committed_files_follow_from_those_of_the_kernels_and_from_committed_rows(machine):
    with steps_path(machine).open(encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    predicted = predict_steps(read_kernels(machine), machine, project_rows(machine))
    assert committed == [{name: str(value) for name, value in row.items()} for row in predicted]


def test_rows_of_an_h200_are_projected_with_the_bandwidth():
    assert project_rows(H200) == {}
    measured = {row.workload: row.tokens_per_s for row in own_steps()}
    projected = project_rows(H100)
    assert {"144p×16", "240p×16", "480p×16", "720p×16"} <= set(projected)
    for workload, (low, high) in projected.items():
        # At worst all of the step, at best less than a tenth of it, slows down as 3.35 to 4.8 TB/s.
        assert 3.35 / 4.8 * measured[workload] < low < high < measured[workload]
        assert high > 0.95 * measured[workload]


def own_steps():
    """Our rows of an H200, those of filled steps last."""
    results = Results.read(ROOT / "benchmarks/results/nvidia-h200")
    rows = [row for row in results.select("step", "") if row.provider == "ours" and row.status == "ok"]
    return sorted(rows, key=lambda row: row.tokens)
