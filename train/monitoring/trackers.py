"""TensorBoard and Weights & Biases beside `DIR/metrics.jsonl`: the numbers of its rows, under the same names and steps.

After a resume each step is there once, as in the rows:

- TensorBoard hides what an event file before had of the steps that are taken again (`purge_step`).
- Weights & Biases goes on with the run whose id `DIR/wandb_run_id` holds, and is given the rows that it lacks. That is
  all of them where it is offline: of several offline folders of one run `wandb sync` sends the oldest first, and each
  replaces what was sent before, so each must be whole. What the server already has it keeps: it takes no step twice.

A tracker that fails is told of and switched off. The run and its rows go on.
"""

import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from opensora_fast.config import TrainConfig
from opensora_fast.files import naming_file
from opensora_fast.train.monitoring.metrics import METRICS, read_metrics

WANDB_PROJECT = "opensora_fast"
Report = Callable[[str], None]


class Tracker(Protocol):
    """Where the numbers of a run are shown."""

    key: str  # of the configuration

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self, failed: bool) -> None:
        """The run has ended, perhaps with an error."""


class TensorBoard:
    """Event files in `DIR/tensorboard`. Each step is on its way to the disk when `write` returns.

    Args:
        out: output folder of the run.
        last_step: the step that the run continues after; later ones are hidden.
    """

    key = "tensorboard"

    def __init__(self, out: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out / "tensorboard"
        with naming_file(folder):
            self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, or what `wandb sync` takes there later, in `DIR/wandb`.

    The project is that of the environment variable WANDB_PROJECT, or "opensora_fast"; wandb reads its others too.

    Args:
        out: output folder of the run; its name is that of the run.
        last_step: the step that the run continues after.
        config: is shown with the run.
        report: is given lines for a person.

    Raises:
        ValueError: wandb cannot begin, as nobody is logged in, or its server does not answer.
    """

    key = "wandb"

    def __init__(self, out: Path, last_step: int, config: TrainConfig, report: Report) -> None:
        import wandb

        rows = list(_read_numbers(out / METRICS))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=out.resolve().name,
                id=self._keep_id(out / "wandb_run_id"),
                resume="allow",
                dir=str(out.resolve()),
                config=config.model_dump(mode="json"),
                allow_val_change=True,
            )
        except Exception as error:  # wandb documents five kinds, and raises those of its HTTP client too
            raise ValueError(
                f"wandb=True, but Weights & Biases cannot begin: {error}\nRun `wandb login` once, or train with "
                "WANDB_MODE=offline in the environment and `wandb sync` later, or with wandb=False"
            ) from error
        lacked = self._run.starting_step
        if lacked > last_step + 1:
            report(f"note: Weights & Biases has steps up to {lacked - 1} of this run already, and keeps them")
        self._first = max(lacked, last_step + 1)
        for step, numbers in rows:
            if lacked <= step <= last_step:
                self._run.log(numbers, step=step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step >= self._first:
            self._run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _keep_id(self, path: Path) -> str:
        kept = path.read_text().strip() if path.exists() else ""
        if not kept:
            kept = secrets.token_hex(4)
            path.write_text(f"{kept}\n")
        return kept


class Trackers:
    """Those of a run. Leaving the block ends them.

    Args:
        trackers: to be given every step.
        report: is told when one fails.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), report: Report = print) -> None:
        self._trackers = list(trackers)
        self._report = report

    def write(self, row: dict[str, Any]) -> None:
        """Hand on the numbers of a row of `metrics.jsonl`."""
        numbers = get_numbers(row)
        for tracker in tuple(self._trackers):
            self._try(tracker, partial(tracker.write, row["step"], numbers))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for tracker in tuple(self._trackers):
            self._try(tracker, partial(tracker.close, kind is not None))
        self._trackers.clear()

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: a full disk, the network, wandb's process
            self._trackers.remove(tracker)
            self._report(
                f"warning: {tracker.key} has failed and is switched off; {METRICS} goes on ({_describe(error)})"
            )


def check_trackers(config: TrainConfig) -> None:
    """ValueError for a tracker whose package is not installed."""
    for key in ("tensorboard", "wandb"):
        if not getattr(config, key):
            continue
        spec = importlib.util.find_spec(key)
        # A folder of that name, as both write one, is found as a package without an origin.
        if spec is None or spec.origin is None:
            raise ValueError(f"{key}=True needs the package {key}: pip install {key}, or set {key}=False")


def open_trackers(config: TrainConfig, out: Path, last_step: int, report: Report) -> Trackers:
    """Those that a configuration asks for, on the process that writes the files of a run.

    Args:
        config: of the run.
        out: its output folder.
        last_step: the step that it continues after.
        report: is given lines for a person.

    Raises:
        ValueError: one cannot begin.
    """
    trackers: list[Tracker] = []
    with ExitStack() as stack:
        # First what may not begin: nothing is hidden then.
        if config.wandb:
            trackers.append(WeightsAndBiases(out, last_step, config, report))
            stack.callback(trackers[0].close, failed=True)  # where the next cannot begin
        if config.tensorboard:
            trackers.append(TensorBoard(out, last_step))
        stack.pop_all()
    return Trackers(trackers, report)


def get_numbers(row: dict[str, Any]) -> dict[str, float]:
    """What trackers take of a row: its finite numbers, without that of the step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _read_numbers(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for row in read_metrics(path) if path.exists() else ():
        yield row["step"], get_numbers(row)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else repr(error)
