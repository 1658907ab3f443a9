"""Predicted steps: added up by hand, and what the committed file says of itself."""

import csv
from collections import Counter

import pytest
import torch

from opensora_fast.benchmarks.predictions import RESOLUTIONS
from opensora_fast.benchmarks.predictions.steps import (
    DEFAULT_PATH,
    TIMES,
    predict_steps,
    product_flops_per_token,
    read_kernels,
)
from opensora_fast.costs.operations import linear_flops_per_token
from opensora_fast.kernels import PackLayout, spatial_attention
from opensora_fast.kernels.attention import spatial_backward, spatial_forward, spatial_preparation
from opensora_fast.model import STDiT2Config


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


def test_the_committed_file_follows_from_that_of_the_kernels():
    with DEFAULT_PATH.open(encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    assert committed == [{name: str(value) for name, value in row.items()} for row in predict_steps(read_kernels())]
