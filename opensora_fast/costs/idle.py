"""How long processes wait for each other: in every step all of them wait for the one with the most work."""

from __future__ import annotations

import numpy as np


def slowest_of_each_step(costs: np.ndarray, world_size: int) -> np.ndarray:
    """Cost of each step: the largest among the `world_size` consecutive micro-batches that are taken at once.

    Args:
        costs: [micro-batches] in their order; what does not fill a step at the end is left out.

    Raises:
        ValueError: there are fewer than one step takes.
    """
    steps = len(costs) // world_size
    if not steps:
        raise ValueError(f"{len(costs)} micro-batches do not fill one step of {world_size} processes: use fewer")
    return costs[: steps * world_size].reshape(steps, world_size).max(axis=1)


def idle_share(costs: np.ndarray, world_size: int) -> float:
    """Share of all processes' time that is spent waiting for the slowest one; arguments as above."""
    slowest = slowest_of_each_step(costs, world_size)
    return max(0.0, 1.0 - float(costs[: len(slowest) * world_size].sum() / (slowest.sum() * world_size)))
