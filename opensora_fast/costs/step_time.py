"""Time of a training step from counted operations and bytes: the limit of the datasheet, or fitted to measured steps.

    seconds = a · FLOP / matrix rate + b · bytes / bandwidth + c

Rates are those of the GPU's datasheet. Counted, a = b = 1 and c = 0: a limit that nothing reaches. Fitted, a, b and c
are the non-negative numbers with the least sum of squared relative errors over the measured steps: 1/a and 1/b are the
shares of both rates that a step reaches, c is what every step costs whatever its size (launches).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora_fast.costs.hardware import Gpu
from opensora_fast.costs.operations import Count

# Three numbers are fitted; with at least twice as many rows the residuals say something.
FEWEST_ROWS = 6


@dataclass(frozen=True)
class MeasuredStep:
    """A measured training step: what it is called, what was counted for it, and how long it took in seconds."""

    name: str
    count: Count
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """Predicts the time of a step on one GPU.

    Attributes:
        gpu: whose rates are meant.
        matrix: times the matrix operations take, relative to the datasheet's rate (a).
        bandwidth: likewise of the bytes (b).
        constant: seconds of every step (c).
        rows: measured steps behind it; 0: it is counted.
        measured_on: name of the GPU that they were measured on, which is like `gpu`.
        worst_residual: largest error among them, relative to the measured time.
    """

    gpu: Gpu
    matrix: float = 1.0
    bandwidth: float = 1.0
    constant: float = 0.0
    rows: int = 0
    measured_on: str = ""
    worst_residual: float = 0.0

    def seconds(self, count: Count) -> float:
        """Of one step."""
        memory = self.bandwidth * count.bytes / self.gpu.bandwidth
        return self.matrix * count.flops / self.gpu.matrix_flops + memory + self.constant

    @property
    def basis(self) -> str:
        """Where the numbers come from; belongs beside every one of them."""
        if not self.rows:
            return "counted, not measured"
        rows = f"{self.rows} rows of {self.measured_on}"
        if self.measured_on != self.gpu.name:
            rows += f", a chip of the rates of {self.gpu.name}"
        return f"fitted to {rows}, worst residual {100 * self.worst_residual:.1f} %"


def fit_step_time(gpu: Gpu, steps: Sequence[MeasuredStep], measured_on: str | None = None) -> StepTime:
    """Fits the three numbers to measured steps of the same model on one GPU.

    Args:
        measured_on: name of another GPU that the steps are of, like this one; None: they are of this one.

    Raises:
        ValueError: there are fewer than `FEWEST_ROWS`, or they are too alike to tell the numbers apart.
    """
    if len(steps) < FEWEST_ROWS:
        raise ValueError(
            f"{len(steps)} measured training steps of {gpu.name} are too few for a fit, which takes {FEWEST_ROWS} of "
            "different shapes; `opensora-fast bench --suite step` measures them"
        )
    times = [[step.count.flops / gpu.matrix_flops, step.count.bytes / gpu.bandwidth, 1.0] for step in steps]
    parts = np.array(times) / np.array([[step.seconds] for step in steps])
    scale = np.linalg.norm(parts, axis=0)
    if np.linalg.matrix_rank(parts / scale, tol=1e-3) < parts.shape[1]:
        raise ValueError(
            f"the {len(steps)} measured training steps of {gpu.name} are too alike for a fit: it takes other lengths "
            "and other numbers of tokens; `opensora-fast bench --suite step` measures them"
        )
    matrix, bandwidth, constant = _least_squares_not_negative(parts).tolist()
    residuals = np.abs(parts @ np.array([matrix, bandwidth, constant]) - 1)
    worst = float(residuals.max())
    return StepTime(gpu, matrix, bandwidth, constant, len(steps), measured_on or gpu.name, worst)


def _least_squares_not_negative(parts: np.ndarray) -> np.ndarray:
    """x ≥ 0 [3] with the least |parts · x - 1|: of all choices of zeros the best without negatives."""
    best, least = np.zeros(parts.shape[1]), float(len(parts))
    for size in range(1, parts.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(parts.shape[1]), size)):
            found, *_ = np.linalg.lstsq(parts[:, chosen], np.ones(len(parts)), rcond=None)
            error = float(np.square(parts[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(parts.shape[1]), error
                best[chosen] = found
    return best
