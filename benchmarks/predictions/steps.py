"""What a training step should take on a GPU: the predicted kernels of all blocks, matrix products and the optimizer.

    python -m opensora_fast.benchmarks.predictions.steps [--gpu H100]

adds up `predictions/h100.csv` (`predictions.kernels`) into `predictions/h100_steps.csv`; without --gpu those of an
H200. It says where the time of a step goes, what that makes in tokens/s, and the rate that matrix products would need
for the goal, which is one for an H200. Nothing here is a measurement. Not in it: products of the text (keys and values
of cross-attention, less than half a percent of a step), the layers before and behind the blocks, the loss, launches and
what waits for them.

For other GPUs our committed rows of an H200 are projected too: matrix products take as long, and the bandwidth slows
down at best the counted bytes, at worst all that is not matrix products.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.operations import OPTIMIZER_BYTES
from opensora_fast.model import STDiT2Config

from ..report.results import Results
from ..report.step_rows import find_committed_rows
from . import PRODUCTS, PROJECTED_HIGH, PROJECTED_LOW, RESOLUTIONS, STEPS
from .kernels import H200, MACHINES, Machine, path_of, write_predictions

PARTS = ("spatial_attention", "temporal_attention", "cross_attention", "norms and gates", "gelu_tanh")
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


def steps_path(machine: Machine) -> Path:
    """The file of its steps' predictions."""
    path = path_of(machine)
    return path.with_name(f"{path.stem}_steps.csv")


def project_rows(machine: Machine) -> dict[str, tuple[float, float]]:
    """Workload → tokens/s that our committed rows of an H200 make on another GPU, (lowest, highest)."""
    if machine is H200:
        return {}
    folder = find_committed_rows(DATASHEETS[H200.name])
    assert folder is not None
    results = Results.read(folder)
    found = {}
    for resolution in RESOLUTIONS:
        workload = f"{resolution}×16"
        works = [work for work in results.works("step", "") if work.first.workload == workload]
        rows = [row for work in works if (row := work.of("ours"))]
        largest = max(rows, key=lambda row: row.tokens, default=None)
        projected = results.project_step(largest, DATASHEETS[machine.name]) if largest else None
        if projected:
            found[workload] = projected
    return found


def predict_steps(
    kernels: Iterable[Mapping[str, str]],
    machine: Machine = H200,
    projected: Mapping[str, tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """One row for each resolution, from rows of `predictions.kernels`; times in ns for each token.

    Args:
        projected: see `project_rows`.
    """
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
        times["optimizer"] = 1e9 * (OPTIMIZER_BYTES + GATHERED_BYTES) * PARAMETERS / machine.dram / tokens
        rest = sum(times.values())
        # At the good and at the hoped-for rates of cuBLAS.
        slow, fast = (1e-3 * sum(flops[name] / PRODUCTS[name][rate] for name in flops) for rate in (0, 1))
        row = {
            "kind": "prediction",
            "machine": f"NVIDIA {machine.name}",
            "workload": f"{resolution}×16",
            "tokens": tokens,
            **{f"{part} ns": round(value, 1) for part, value in times.items()},
            "products ns, slow": round(slow, 1),
            "products ns, fast": round(fast, 1),
            "k tokens/s, slow": round(1e6 / (rest + slow), 1),
            "k tokens/s, fast": round(1e6 / (rest + fast), 1),
        }
        if machine is H200:
            good, goal = (values[index] for values in STEPS["ours"])
            needed = round(1e-3 * sum(flops.values()) / (1e6 / goal - rest))
            rows.append(row | {"good": good, "goal": goal, "TFLOP/s of products for the goal": needed})
        else:
            low, high = (projected or {}).get(row["workload"], ("", ""))
            rows.append(
                row | {PROJECTED_LOW: low and round(low / 1e3, 1), PROJECTED_HIGH: high and round(high / 1e3, 1)}
            )
    return rows


def read_kernels(machine: Machine = H200) -> list[dict[str, str]]:
    """The committed predictions of kernels."""
    with path_of(machine).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Predict the time of training steps on a GPU from that of the kernels."
    )
    parser.add_argument("--gpu", choices=list(MACHINES), default=H200.name, help="whose rates; default: %(default)s")
    machine = MACHINES[parser.parse_args().gpu]
    rows = predict_steps(read_kernels(machine), machine, project_rows(machine))
    write_predictions(rows, steps_path(machine))
    print(f"Predictions for {machine.name}, not measurements ({machine.sources}); ns for each token:")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if name not in ("kind", "machine")))
    print(f"wrote {steps_path(machine)}")


if __name__ == "__main__":
    main()
