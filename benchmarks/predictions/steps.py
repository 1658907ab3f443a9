"""What a training step should take on an H200: the predicted kernels of all blocks, matrix products and the optimizer.

    python -m opensora_fast.benchmarks.predictions.steps

adds up `predictions/h200.csv` (`predictions.kernels`) into `predictions/h200_steps.csv`: where the time of a step goes,
what that makes in tokens/s, and the rate that matrix products would need for the goal. Nothing here is a measurement.
Not in it: products of the text (keys and values of cross-attention, less than half a percent of a step), the layers
before and behind the blocks, the loss, launches and what waits for them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora_fast.costs.operations import OPTIMIZER_BYTES
from opensora_fast.model import STDiT2Config

from ..predictions import PRODUCTS, RESOLUTIONS, STEPS
from .kernels import DEFAULT_PATH as KERNELS_PATH
from .kernels import H200, write_predictions

DEFAULT_PATH = KERNELS_PATH.with_name("h200_steps.csv")
PARTS = ("spatial_attention", "temporal_attention", "cross_attention", "norms and gates", "gelu_tanh")
ELEMENTWISE = ("modulated_norm", "gate_residual")
# How often a block launches a kernel, where it is not once.
TIMES = {
    "gate_residual_modulated_norm_forward": 3.0,
    "gate_residual_modulated_norm_backward": 3.0,
    # In the forward pass, and again in the backward pass in place of keeping them.
    "spatial_attention_preparation": 2.0,
    # Before the first block and behind the last only.
    "modulated_norm_forward": 2 / 28,
    "modulated_norm_backward": 2 / 28,
}
# Linear layers of a block on all tokens, in products of [N, C] by [C, C], by their name in PRODUCTS.
SQUARES = {"qkv": 6, "proj": 4, "fc1": 4, "fc2": 4}
PARAMETERS = 767.5e6
GATHERED_BYTES = 6  # of a parameter: its gradient is copied into a flat tensor, whose norm is then taken


def product_flops_per_token(config: STDiT2Config) -> dict[str, float]:
    """Layer → FLOP per token of its three products, in all blocks."""
    return {name: 3 * 2.0 * count * config.hidden_size**2 * config.depth for name, count in SQUARES.items()}


def part_of(kernel: str) -> str:
    """Which of PARTS a kernel belongs to."""
    return next((part for part in PARTS if kernel.startswith(part)), "norms and gates")


def predict_steps(kernels: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """One row for each resolution, from rows of `predictions.kernels`; times in ns for each token."""
    config = STDiT2Config.xl_2()
    kernels = list(kernels)
    flops = product_flops_per_token(config)
    rows = []
    for index, resolution in enumerate(RESOLUTIONS):
        own = [row for row in kernels if row["workload"].partition("×")[0] == resolution]
        tokens = int(own[0]["tokens"])
        times: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
        for row in own:
            launches = TIMES.get(row["kernel"], 1.0) * config.depth
            times[part_of(row["kernel"])] += 1e3 * float(row["predicted_us"]) * launches / tokens
        times["optimizer"] = 1e9 * (OPTIMIZER_BYTES + GATHERED_BYTES) * PARAMETERS / H200.dram / tokens
        rest = sum(times.values())
        # At the good and at the hoped-for rates of cuBLAS.
        slow, fast = (1e-3 * sum(flops[name] / PRODUCTS[name][rate] for name in flops) for rate in (0, 1))
        good, goal = (values[index] for values in STEPS["ours"])
        rows.append(
            {
                "kind": "prediction",
                "machine": H200.name,
                "workload": f"{resolution}×16",
                "tokens": tokens,
                **{f"{part} ns": round(value, 1) for part, value in times.items()},
                "products ns, slow": round(slow, 1),
                "products ns, fast": round(fast, 1),
                "k tokens/s, slow": round(1e6 / (rest + slow), 1),
                "k tokens/s, fast": round(1e6 / (rest + fast), 1),
                "good": good,
                "goal": goal,
                "TFLOP/s of products for the goal": round(1e-3 * sum(flops.values()) / (1e6 / goal - rest)),
            }
        )
    return rows


def read_kernels(path: Path = KERNELS_PATH) -> list[dict[str, str]]:
    """The committed predictions of kernels."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    rows = predict_steps(read_kernels())
    write_predictions(rows, DEFAULT_PATH)
    print(f"Predictions for {H200.name}, not measurements ({H200.sources}); ns for each token:")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if name not in ("kind", "machine")))
    print(f"wrote {DEFAULT_PATH}")


if __name__ == "__main__":
    main()
