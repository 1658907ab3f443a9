"""One JSON object for each training step, in `DIR/metrics.jsonl`."""

import json
import math
import operator
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opensora_fast.data.batch import Batch
from opensora_fast.data.buckets.explain import count_tokens
from opensora_fast.files import write_whole

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to a JSONL file; each is on its way to the disk when `write` returns.

    Args:
        path: the file.
        last_step: rows of later steps are removed first, so that after a resume every step is there once.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= last_step] if path.exists() else []
        write_whole(path, "".join(_to_line(row) for row in kept))
        self._path = path
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null. ValueError if it cannot be written."""
        try:
            self._file.write(_to_line(row))
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self._path} could not be written: {error}. Once it can be, --resume auto continues from the last "
                "checkpoint"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # `write` has told of what is still to be written
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill has cut off is left out. ValueError names a damaged line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
            operator.index(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row of a step: {error!r}; remove that line") from None
        rows.append(row)
    return rows


def count_batch_tokens(batch: Batch, patch: int) -> int:
    """Video tokens of a micro-batch in a model whose tokens have so many latents to a side."""
    size = (int(values[0]) for values in (batch.num_frames, batch.height, batch.width))
    return len(batch) * count_tokens(*size, patch)


def join_parts(told: list[dict[str, Any]], replicas: int) -> dict[str, Any]:
    """What a step's row has of its micro-batches: means of losses, sums of tokens and clips, the longest wait, the most
    memory and the most retries of any process.

    Args:
        told: by each process of its part, in the order of ranks.
        replicas: how many micro-batches they computed.
    """
    each = told[:: len(told) // replicas]  # of each micro-batch the first process
    row = {key: sum(process["losses"][key] for process in each) / len(each) for key in each[0]["losses"]}
    row |= {
        "tokens": sum(process["tokens"] for process in each),
        "data_wait": max(process["data_wait"] for process in told),
        "bucket": each[0]["bucket"],
        "batch_size": sum(process["clips"] for process in each),
        "memory": max(process["memory"] for process in told),
        "memory_retries": max(process["memory_retries"] for process in told),
    }
    if len(each) > 1:
        row["buckets"] = [process["bucket"] for process in each]
    return row


def peak_memory(device: torch.device) -> int:
    """Bytes: most that torch held on the GPU so far, or the process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _to_line(row: dict[str, Any]) -> str:
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean) + "\n"
