"""What is told of every step of a run: its row, in `DIR/metrics.jsonl` and to the trackers, and the progress."""

from typing import Any

from opensora_fast.progress import Progress
from opensora_fast.train.monitoring.metrics import MetricsWriter
from opensora_fast.train.monitoring.trackers import Trackers


class StepRows:
    """Takes the rows of a run, on the process that writes its files.

    Args:
        metrics: the file.
        trackers: are given every row.
        progress: shows the mean loss of the last `log_every` steps, and of the last one what it took.
    """

    def __init__(self, metrics: MetricsWriter, trackers: Trackers, progress: Progress, log_every: int) -> None:
        self._metrics = metrics
        self._trackers = trackers
        self._progress = progress
        self._log_every = log_every
        self._losses: list[float] = []

    def write(self, row: dict[str, Any]) -> None:
        """Take the row of the next step."""
        self._metrics.write(row)
        self._trackers.write(row)
        self._losses = [*self._losses, row["loss"]][-self._log_every :]
        shown = {
            "loss": f"{sum(self._losses) / len(self._losses):.4f}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "data wait": f"{100 * row['data_wait'] / row['step_time']:.0f} %",
        }
        self._progress.advance(1, **shown)
