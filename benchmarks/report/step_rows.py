"""Measured training steps of a results folder, for the cost model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from opensora_fast.costs.hardware import Gpu, recognize_gpu
from opensora_fast.costs.memory import MemoryModel
from opensora_fast.costs.operations import Count, VideoBatch, count_recomputation
from opensora_fast.costs.step_time import MeasuredStep
from opensora_fast.model import STDiT2Config

from ..providers.model_work import TRAINING
from ..providers.variants import RECOMPUTING, VARIANT_OF
from ..rows import Row
from .results import Results

OURS = ("ours", *(f"ours{name}" for name in RECOMPUTING))


@dataclass(frozen=True)
class StepRow:
    """One measured step: its videos, the tokens of their captions, how many blocks recompute, and the row."""

    videos: tuple[VideoBatch, ...]
    text: int
    recomputed: int
    row: Row


@dataclass(frozen=True)
class StepRows:
    """The training steps of this project's own in a folder, of one model and dtype, on one GPU."""

    folder: Path
    gpu: Gpu
    rows: tuple[StepRow, ...]

    def list_steps(self, config: STDiT2Config, element: int) -> list[MeasuredStep]:
        """Their counts, with what was recomputed, and times.

        Args:
            element: bytes of an activation.
        """
        steps = []
        for step in self.rows:
            count = Count(step.row.flops, step.row.bytes)
            for part in step.videos:
                count += count_recomputation(config, part, step.text, step.recomputed, element)
            steps.append(MeasuredStep(step.row.name, count, step.row.p50_ms / 1e3))
        return steps

    def compare_memory(self, model: MemoryModel) -> list[float]:
        """Measured over counted memory of activations, of each step of videos of one shape.

        Args:
            model: of one process without encoders, as steps are measured.
        """
        ratios = []
        for step in self.rows:
            if len(step.videos) == 1 and step.row.memory_bytes:
                counting = replace(model, text=step.text, processes=1, encoders=0)
                counted = counting.activations(step.videos[0], step.recomputed)
                ratios.append((step.row.memory_bytes - counting.standing) / counted)
        return ratios


def read_step_rows(folder: Path, config: STDiT2Config, dtype: str) -> StepRows:
    """Reads the training steps of a results folder.

    Args:
        config: only rows of a model of this width and depth are taken.
        dtype: as in rows, for example "bfloat16".

    Raises:
        ValueError: there is no row in it, rows of several devices, a broken file, or a device whose rates are unknown.
    """
    results = Results.read(folder)
    gpu = recognize_gpu(results.device_name)
    if gpu is None:
        raise ValueError(
            f"{folder} holds rows of {results.device_name}, whose rates are not known: give a folder of a GPU's rows"
        )
    rows = [_read(row) for row in results.latest if _is_wanted(row, config, dtype)]
    return StepRows(folder, gpu, tuple(rows))


def find_committed_rows(gpu: Gpu) -> Path | None:
    """The folder of committed rows of a GPU, or else of one that is like it; None while there is none."""
    folders = sorted(Path(str(files("opensora_fast.benchmarks").joinpath("results"))).iterdir())
    known = [(folder, found) for folder in folders if folder.is_dir() and (found := recognize_gpu(folder.name))]
    alike = [(found.name != gpu.name, folder) for folder, found in known if found.is_like(gpu)]
    return min(alike)[1] if alike else None


def _is_wanted(row: Row, config: STDiT2Config, dtype: str) -> bool:
    sizes = _read_sizes(row.shape)
    return (
        (row.level, row.op, row.direction, row.status) == ("step", "", TRAINING, "ok")
        and row.provider in OURS
        and row.dtype == dtype
        and sizes.get("C") == config.hidden_size
        and sizes.get("layers") == config.depth
    )


def _read(row: Row) -> StepRow:
    parts: Sequence[tuple[str, ...]] = re.findall(r"B=(\d+) T=(\d+) S=(\d+)", row.shape)
    videos = tuple(VideoBatch(*map(int, part)) for part in parts)
    sizes = _read_sizes(row.shape)
    return StepRow(videos, sizes["L"], round(VARIANT_OF[row.provider].recompute * sizes["layers"]), row)


def _read_sizes(shape: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"\b([A-Za-z]+)=(\d+)", shape)}
