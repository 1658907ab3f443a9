"""Which micro-batches made the loss or the gradient of a step something that is not a finite number."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_fast.data.batch import Batch
from opensora_fast.parallel.processes import Processes


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite. Nothing was changed by that step."""


def find_not_finite(processes: Processes, value: float, batch: Batch) -> list[dict[str, Any]]:
    """Those whose value is not finite, as `nonfinite.json` has them; to be called by all processes.

    Args:
        value: this process's loss or gradient norm.
        batch: this process's.
    """
    own = {
        "rank": processes.rank,
        "value": str(value),
        "bucket": list(batch.bucket),
        "rows": list(batch.rows),
        "texts": list(batch.text),
        "epoch": batch.epoch,
        "micro_batch": batch.index,
    }
    found: dict[int, dict[str, Any]] = {}
    for told in processes.gather(own):
        if not math.isfinite(float(told["value"])):
            found.setdefault(told["micro_batch"], told)  # several processes may share one
    return list(found.values())


def describe_batches(batches: Sequence[dict[str, Any]], world_size: int) -> str:
    """A line for each, for a person."""
    return "\n".join(f"  {_describe(told, world_size)}" for told in batches)


def write_report(folder: Path, report: dict[str, Any]) -> str:
    """Write `nonfinite.json` into the output folder of the run; returns for a person where it is, or why it is not."""
    path = folder / "nonfinite.json"
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        return f"{path} could not be written: {error}"
    return f"also in {path}"


def _describe(told: dict[str, Any], world_size: int) -> str:
    process = "" if world_size == 1 else f"rank {told['rank']}: "
    return (
        f"{process}bucket {tuple(told['bucket'])}, rows {', '.join(map(str, told['rows']))} of the table, micro-batch "
        f"{told['micro_batch']} of epoch {told['epoch']}"
    )
