"""Diffusion: noise schedules, training losses, samplers and frame masks, as in Open-Sora 1.1."""

from typing import Any

from opensora_fast.diffusion.dpm_solver import DPMSolver
from opensora_fast.diffusion.iddpm import IDDPM
from opensora_fast.diffusion.masks import MaskGenerator
from opensora_fast.diffusion.speed import SpeeDiffusion

SCHEDULERS = {"iddpm": IDDPM, "iddpm-speed": SpeeDiffusion, "dpm-solver": DPMSolver}

__all__ = ["IDDPM", "SCHEDULERS", "DPMSolver", "MaskGenerator", "SpeeDiffusion", "build_scheduler"]


def build_scheduler(config: dict[str, Any]) -> IDDPM | DPMSolver:
    """Build the scheduler that a configuration's `scheduler` section describes: `type` and its keyword arguments.

    Raises:
        ValueError: an unknown type, or an argument that the type does not take.
    """
    arguments = {key: value for key, value in config.items() if key != "type"}
    scheduler = SCHEDULERS.get(config.get("type", ""))
    if scheduler is None:
        raise ValueError(f"scheduler type {config.get('type')!r} is unknown; use one of {', '.join(SCHEDULERS)}")
    try:
        return scheduler(**arguments)
    except TypeError as error:
        raise ValueError(f"scheduler type {config['type']!r}: {error}") from error
