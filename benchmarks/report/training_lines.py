"""Training steps of 16 frames at five resolutions: ours on each measured GPU, its peers beside it, limits, figures.

What the README's table and figure show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.model import STDiT2

from ..providers.variants import RECOMPUTING
from ..roofline import floor_tokens_per_s
from ..rows import Row
from ..shapes import VIDEO_SIZES, fill
from ..suites.scale import FILL_TOKENS, scale_of
from .results import Results, is_ours, published_for

FRAMES = 16
WORKLOADS = {f"{resolution}×{FRAMES}" for resolution in VIDEO_SIZES}
GOALS_FOR, PUBLISHED_ON = "H200", "H800"
# Of each the fastest that is right: Open-Sora's own code and this project's writing of it, ways to compile.
AS_SHIPPED = ("open-sora", "upstream")
WITH_FLASH = ("open-sora-flash", "upstream-flash", "upstream-flash-stored")
COMPILED = ("compile", "compile-one-order", *(f"compile{name}" for name in RECOMPUTING))
PROVIDERS = {"compiled": COMPILED, "with_flash": WITH_FLASH, "as_shipped": AS_SHIPPED}
# What stands beside ours where it was measured in the same run: an attribute of `OnGpu`, and its name.
PEERS = (
    ("compiled", "torch.compile"),
    ("with_flash", "Open-Sora's model with flash attention"),
    ("as_shipped", "Open-Sora's model as shipped"),
)


@dataclass(frozen=True)
class OnGpu:
    """One resolution on one GPU, tokens/s.

    Attributes:
        gpu: its name.
        floor: what operations and bytes allow at its datasheet's rates.
        ours: our fastest row of those that most peers stand beside; None: not measured.
        compiled: by torch.compile, on the same videos in the same run; None: not measured.
        with_flash: likewise Open-Sora's model, with the flash attention that its configurations mean to turn on.
        as_shipped: likewise Open-Sora's model as it is shipped.
        refused: of these three those that were measured, beside ours, and wrong: what was, "gradients" or "results".
    """

    gpu: str
    floor: float
    ours: Row | None = None
    compiled: Row | None = None
    with_flash: Row | None = None
    as_shipped: Row | None = None
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One resolution.

    Attributes:
        measured: on each GPU with rows of ours; without any, on the one that the goals are for, not measured.
        published_floor: the limit of the GPU of the published figures.
        published: tokens/s of one GPU by Open-Sora, with VAE and T5.
    """

    resolution: str
    measured: tuple[OnGpu, ...]
    published_floor: float
    published: float | None


def training_lines(folders: Sequence[Results]) -> list[Line]:
    """The five resolutions."""
    scale = scale_of("cuda", DATASHEETS[GOALS_FOR])
    with torch.device("meta"):
        parameters = float(sum(parameter.numel() for parameter in STDiT2(scale.config).parameters()))
    lines = []
    for resolution in VIDEO_SIZES:
        workload = fill(resolution, FRAMES, FILL_TOKENS)

        def floor(gpu: str, workload=workload) -> float:
            return floor_tokens_per_s(scale.config, workload, scale.text, parameters, DATASHEETS[gpu])

        measured = tuple(_on_gpu(folders, gpu, workload.name, floor(gpu)) for gpu in _measured_gpus(folders))
        published = max((item.tokens_per_s for item in published_for(workload.name)), default=None)
        lines.append(Line(resolution, measured, floor(PUBLISHED_ON), published))
    return lines


def _measured_gpus(folders: Sequence[Results]) -> list[str]:
    """That of the goals first."""
    names = dict.fromkeys([GOALS_FOR, *DATASHEETS])
    return [name for name in names if _steps(folders, name)] or [GOALS_FOR]


def _steps(folders: Sequence[Results], gpu: str) -> list[Row]:
    """Our measured training steps of 16 frames at the resolutions of the table."""
    return [
        row
        for results in folders
        if results.datasheet is DATASHEETS[gpu]
        for row in results.select("step", "")
        if row.status == "ok" and is_ours(row) and row.workload in WORKLOADS
    ]


def _on_gpu(folders: Sequence[Results], gpu: str, workload: str, floor: float) -> OnGpu:
    rows = [row for row in _steps(folders, gpu) if row.workload == workload]
    found = [_beside(folders, OnGpu(gpu, floor, row)) for row in rows]
    return max(found, key=_worth, default=OnGpu(gpu, floor))


def _beside(folders: Sequence[Results], on: OnGpu) -> OnGpu:
    assert on.ours is not None
    peers = {name: _fastest_beside(folders, on.ours, providers) for name, providers in PROVIDERS.items()}
    refused = {
        name: wrong
        for name, providers in PROVIDERS.items()
        if peers[name] is None and (wrong := _refused_beside(folders, on.ours, providers))
    }
    return replace(on, **peers, refused=refused)


def _worth(found: OnGpu) -> tuple[int, float]:
    assert found.ours is not None
    peers = sum(row is not None for row in (found.compiled, found.with_flash, found.as_shipped))
    return peers, found.ours.tokens_per_s


def _fastest_beside(folders: Sequence[Results], ours: Row, providers: Sequence[str]) -> Row | None:
    """Of the rows of the providers that were measured beside ours."""
    rows = [row for results in folders for row in results.select("step", "") if row.provider in providers]
    alike = [row for row in rows if row.status == "ok" and _same_run(row, ours)]
    return min(alike, key=lambda row: row.p50_ms, default=None)


def _refused_beside(folders: Sequence[Results], ours: Row, providers: Sequence[str]) -> str:
    """What was wrong of one of the providers that was measured beside ours, "" where none was."""
    assert ours.environment is not None
    keys = {replace(ours, provider=provider).key for provider in providers}
    run = ours.environment.device_name, ours.environment.commit, ours.environment.dirty
    wrong = [
        item["result"]
        for results in folders
        for item in results.refused
        if tuple(item["key"]) in keys and (item["device_name"], item["commit"], item["dirty"]) == run
    ]
    if not wrong:
        return ""
    return "gradients" if all(result.startswith("gradient") for result in wrong) else "results"


def _same_run(row: Row, other: Row) -> bool:
    """The same work on the same machine, by the same versions and sources: runs may be continued."""
    assert row.environment is not None and other.environment is not None
    same_work = (row.workload, row.direction, row.shape, row.dtype) == (
        other.workload,
        other.direction,
        other.shape,
        other.dtype,
    )
    return same_work and row.environment.undated == other.environment.undated
