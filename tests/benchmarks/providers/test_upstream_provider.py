"""The baseline computes what Open-Sora 1.1 computes, so that comparing against it is fair."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.providers.upstream import UpstreamSTDiT2

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["plain", "frame_mask"])
def test_upstream_baseline_equals_the_golden_files(case, checkpointing, flash):
    model = UpstreamSTDiT2(STDiT2Config.small(), flash=flash, checkpointing=checkpointing).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"), strict=True)
    data = load_file(GOLDEN / f"stdit2_{case}.safetensors")
    inputs = {name[3:]: value for name, value in data.items() if name.startswith("in.")}
    output = model(**inputs)
    assert (output - data["out"]).norm() / data["out"].norm() < 1e-5
    (output * data["out_weight"]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, value in data.items():
        if name.startswith("grad."):
            assert torch.allclose(gradients[name[5:]], value, rtol=1e-3, atol=1e-4 * value.abs().max()), name
