"""What the tests of training compare between two runs."""

from pathlib import Path

from opensora_fast.train.monitoring.metrics import read_metrics


def read_losses(out: Path) -> list[tuple]:
    """What must be equal bit for bit between two runs, one tuple a step."""
    return [
        (
            row["step"],
            row["loss"],
            row["mse"],
            row["vb"],
            row["grad_norm"],
            row["bucket"],
            row["epoch"],
            row["micro_batch"],
        )
        for row in read_metrics(out / "metrics.jsonl")
    ]
